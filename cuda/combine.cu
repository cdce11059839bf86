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
#include <cstring>

#include "common/launch.cuh"
#include "common/math.cuh"
#include "moecore/kernels/combine.hpp"

namespace moecore::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kVectorBytes = 16;
constexpr int kInFlight = 4;  ///< rows that a thread asks for at a time

/// kCount neighbouring elements, moved by loads and stores of up to 16 bytes.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < kVectorBytes ? sizeof(T) * kCount : kVectorBytes) Vector {
    T element[kCount];
};

template <typename Row, int kCount>
__device__ Vector<Row, kCount> load(const Row* row) {
    return *reinterpret_cast<const Vector<Row, kCount>*>(row);
}

/// sum += weight * row, element by element.
template <typename Row, int kCount>
__device__ void accumulate(float weight, const Vector<Row, kCount>& row, float (&sum)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = __fmaf_rn(weight, to_float(row.element[i]), sum[i]);
}

/// Rounds and stores. Whole words go through __stwb, because nvcc splits the store of a struct.
template <typename Output, int kCount>
__device__ void store(const float (&sum)[kCount], void* output, int64_t offset) {
    Vector<Output, kCount> vector;
#pragma unroll
    for (int i = 0; i < kCount; ++i) vector.element[i] = from_float<Output>(sum[i]);
    Output* target = static_cast<Output*>(output) + offset;
    if constexpr (sizeof vector % sizeof(uint4) == 0) {
        uint4 words[sizeof vector / sizeof(uint4)];
        memcpy(words, &vector, sizeof vector);
#pragma unroll
        for (size_t i = 0; i < sizeof vector / sizeof(uint4); ++i)
            __stwb(reinterpret_cast<uint4*>(target) + i, words[i]);
    } else {
        *reinterpret_cast<Vector<Output, kCount>*>(target) = vector;
    }
}

template <typename Row, int kCount>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ CombineArgs args) {
    const int64_t token = blockIdx.x;
    const int64_t column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kCount;
    wait_for_predecessors();
    allow_dependents();
    if (column >= args.hidden_size) return;

    // 1. Add the chosen experts' rows.
    const int32_t* slot_to_row = args.slot_to_row + token * args.top_k;
    const float* weights = args.topk_weights + token * args.top_k;
    const Row* expert_rows = static_cast<const Row*>(args.expert_rows) + column;
    float sum[kCount] = {};
    for (int first = 0; first < args.top_k; first += kInFlight) {
        Vector<Row, kCount> rows[kInFlight];
        float weight[kInFlight];
        bool exists[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int j = first + i;
            const int64_t row = j < args.top_k ? slot_to_row[j] : -1;
            exists[i] = row >= 0 && row < args.num_rows;  // -1 is a dropped slot
            if (!exists[i]) continue;
            weight[i] = weights[j];
            rows[i] = load<Row, kCount>(expert_rows + row * args.rows_stride);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i)
            if (exists[i]) accumulate(weight[i], rows[i], sum);
    }

    // 2. Add the shared expert's. Output may be the same memory: this thread alone touches these
    //    elements, and reads them first.
    if (args.shared_output != nullptr) {
        const float scale = args.shared_scale != nullptr ? args.shared_scale[token] : 1.0f;
        const Row* shared_output = static_cast<const Row*>(args.shared_output) + column;
        accumulate(scale, load<Row, kCount>(shared_output + token * args.shared_stride), sum);
    }

    // 3. Round and store.
    const int64_t offset = token * args.output_stride + column;
    if (args.output_dtype == DType::kBFloat16)
        store<__nv_bfloat16>(sum, args.output, offset);
    else
        store<float>(sum, args.output, offset);
}

/// Whether rows of `stride` elements that begin at `data` can be moved in vectors of `bytes` bytes.
bool is_aligned(const void* data, int64_t stride, DType dtype, size_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
           static_cast<size_t>(stride) * size_of(dtype) % bytes == 0;
}

template <typename Row>
void launch(const CombineArgs& args, Stream stream) {
    constexpr int kCount = kVectorBytes / sizeof(Row);
    const bool use_vectors =
        args.hidden_size % kCount == 0 &&
        is_aligned(args.expert_rows, args.rows_stride, args.rows_dtype, kVectorBytes) &&
        is_aligned(args.shared_output, args.shared_output ? args.shared_stride : 0, args.rows_dtype,
                   kVectorBytes) &&
        is_aligned(args.output, args.output_stride, args.output_dtype, kVectorBytes);
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
