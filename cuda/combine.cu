// Weighted sum of each token's expert rows and shared row, rounded once.
//
//   reads   (R + T) * H * sizeof(row) + T * k * 8 bytes   expert_rows, shared_output, weights, rows
//   writes  T * H * sizeof(output) bytes                  output [T, H]
//
// One thread sums one vector of columns (16 bytes of a row, or one element where alignment forbids)
// of one token, over j = 0 .. k - 1 and then the shared row. It asks for the rows of four choices
// at a time before it adds the first. Needs sm_80.

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>

#include "common/launch.cuh"
#include "common/vectors.cuh"
#include "moecore/kernels/combine.hpp"

namespace moecore::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kInFlight = 4;  ///< rows that a thread asks for at a time

/// sum += weight * row, element by element.
template <typename Row, int kCount>
__device__ void accumulate(float weight, const Vector<Row, kCount>& row, float (&sum)[kCount]) {
    float values[kCount];
    row.to_floats(values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = __fmaf_rn(weight, values[i], sum[i]);
}

/// sum = columns `column` .. of the token's sum. The rows of four choices are asked for at a
/// time before the first is added.
template <typename Row, int kCount>
__device__ void combine_row(const CombineArgs& args, int64_t token, int64_t column,
                            float (&sum)[kCount]) {
    using Elements = Vector<Row, kCount>;
    const int32_t* slot_to_row = args.slot_to_row + token * args.top_k;
    const float* weights = args.topk_weights + token * args.top_k;
    const Row* expert_rows = static_cast<const Row*>(args.expert_rows) + column;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = 0.0f;
    for (int first = 0; first < args.top_k; first += kInFlight) {
        Elements rows[kInFlight];
        float weight[kInFlight];
        bool exists[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int j = first + i;
            const int64_t row = j < args.top_k ? slot_to_row[j] : -1;
            exists[i] = row >= 0 && row < args.num_rows;  // -1 is a dropped slot
            if (!exists[i]) continue;
            weight[i] = weights[j];
            rows[i] = Elements::load(expert_rows + row * args.rows_stride);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i)
            if (exists[i]) accumulate(weight[i], rows[i], sum);
    }
    if (args.shared_output == nullptr) return;
    const float scale = args.shared_scale != nullptr ? args.shared_scale[token] : 1.0f;
    const Row* shared = static_cast<const Row*>(args.shared_output) + column;
    accumulate(scale, Elements::load(shared + token * args.shared_stride), sum);
}

template <typename Row, int kCount>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ CombineArgs args) {
    const int64_t token = blockIdx.x;
    const int64_t column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kCount;
    load_parameters(args);
    wait_for_predecessors();
    allow_dependents();
    if (column >= args.hidden_size) return;

    // Output may be shared_output's memory: this thread alone touches these elements, and reads
    // them first.
    float sum[kCount];
    combine_row<Row>(args, token, column, sum);
    const int64_t offset = token * args.output_stride + column;
    if (args.output_dtype == DType::kBFloat16)
        Vector<__nv_bfloat16, kCount>::from_floats(sum).store(
            static_cast<__nv_bfloat16*>(args.output) + offset);
    else
        Vector<float, kCount>::from_floats(sum).store(static_cast<float*>(args.output) + offset);
}

/// Whether the rows that combine reads can be moved in vectors.
bool are_inputs_aligned(const CombineArgs& args) {
    return are_rows_aligned(args.expert_rows, args.rows_stride, args.rows_dtype) &&
           are_rows_aligned(args.shared_output, args.shared_output ? args.shared_stride : 0,
                            args.rows_dtype);
}

template <typename Row>
void launch(const CombineArgs& args, Stream stream) {
    constexpr int kCount = kVectorBytes / sizeof(Row);
    const bool use_vectors = args.hidden_size % kCount == 0 && are_inputs_aligned(args) &&
                             are_rows_aligned(args.output, args.output_stride, args.output_dtype);
    const auto kernel = use_vectors ? combine_kernel<Row, kCount> : combine_kernel<Row, 1>;
    const int64_t columns_per_block = int64_t{kThreads} * (use_vectors ? kCount : 1);
    const dim3 grid(static_cast<unsigned>(args.num_tokens),
                    static_cast<unsigned>(ceil_div(args.hidden_size, columns_per_block)));
    launch_dependent("combine", kernel, grid, dim3(kThreads), 0, stream, args);
}

}  // namespace

void combine(const CombineArgs& args, Stream stream) {
    if (args.num_tokens == 0) return;  // a grid of 0 blocks is a launch error
    if (args.rows_dtype == DType::kBFloat16)
        launch<__nv_bfloat16>(args, stream);
    else
        launch<float>(args, stream);
}

}  // namespace moecore::cuda
