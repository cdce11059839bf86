// Root mean square norm of rows, with the residual's sum.
//
//   reads   T * n * N * sizeof(element) bytes of input (and of residual), and N of weight
//   writes  the same of output (and of residual)
//
// 64 partial sums a row, element c in number c mod 64, as on the CPU. Short rows (heads): 64
// threads each, four rows a block. Long rows whose vectors are aligned: a block of 256 threads
// each, which moves 16 bytes at a time and passes the squares' sums through shared memory. Needs
// sm_80.

#include <cuda_bf16.h>

#include <cstdint>

#include "common/launch.cuh"
#include "common/vectors.cuh"
#include "moecore/kernels/rms_norm.hpp"

namespace moecore::cuda {
namespace {

constexpr int kPartials = 64;
constexpr int64_t kMaxStaged = 12288 - 256;  ///< elements that shared memory holds, unasked
constexpr int kRowsPerBlock = 4;
constexpr int kThreads = 256;  ///< of a long row's block

/// 1 / sqrt(mean of squares + eps) of a row, in the lanes 0 .. 15 that call it with its 64 partial
/// sums: 64 to 16, then halves. Right in lane 0.
__device__ float scale_of(const RmsNormArgs& args, const float* partials, int lane) {
    const float* p = partials + lane;
    float sum = __fadd_rn(__fadd_rn(p[0], p[16]), __fadd_rn(p[32], p[48]));
    for (int step = 8; step > 0; step /= 2)
        sum = __fadd_rn(sum, __shfl_down_sync(0xffffu, sum, step, 16));
    const float mean = __fdiv_rn(sum, static_cast<float>(args.width));
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, args.eps)));
}

/// Shared memory for scale_of_row.
struct RowSums {
    float partials[kPartials];
    float scale;
};

/// The scale of a row in shared memory, in every thread of the block, which has at least kPartials.
/// Waits for the block before it reads the row.
__device__ float scale_of_row(const RmsNormArgs& args, const float* row, RowSums& sums) {
    const int thread = static_cast<int>(threadIdx.x), width = static_cast<int>(args.width);
    __syncthreads();  // the row is there
    if (thread < kPartials) {
        float partial = 0.0f;
#pragma unroll 8
        for (int column = thread; column < width; column += kPartials)
            partial = __fmaf_rn(row[column], row[column], partial);
        sums.partials[thread] = partial;
    }
    __syncthreads();  // every partial sum is there
    if (thread < 16) {
        const float scale = scale_of(args, sums.partials, thread);
        if (thread == 0) sums.scale = scale;
    }
    __syncthreads();  // the scale is there
    return sums.scale;
}

/// x = round(x + other), element by element; also as it is stored.
template <typename Element, int kCount>
__device__ Vector<Element, kCount> add_residual(float (&x)[kCount],
                                                const Vector<Element, kCount>& other) {
    float values[kCount];
    other.to_floats(values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = __fadd_rn(x[i], values[i]);
    const auto sum = Vector<Element, kCount>::from_floats(x);
    sum.to_floats(x);
    return sum;
}

/// output = round(weight * round(x * scale)), element by element.
template <typename Element, typename Weight, int kCount>
__device__ void store_scaled(const float* x, float scale, const Vector<Weight, kCount>& weight,
                             Element* output) {
    float values[kCount], weights[kCount];
    Vector<float, kCount>::load(x).to_floats(values);
    weight.to_floats(weights);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = __fmul_rn(values[i], scale);
    Vector<Element, kCount>::from_floats(values).to_floats(values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = __fmul_rn(weights[i], values[i]);
    Vector<Element, kCount>::from_floats(values).store(output);
}

__device__ int64_t offset_of(const RmsNormArgs& args, const HeadStrides& strides, int64_t row) {
    return row / args.num_heads * strides.token + row % args.num_heads * strides.head;
}

/// round(weight * round(x * scale))
template <typename Element>
__device__ Element scaled(float x, float scale, float weight) {
    const Element rounded = from_float<Element>(__fmul_rn(x, scale));
    return from_float<Element>(__fmul_rn(weight, to_float(rounded)));
}

template <typename Element, typename Weight>
__global__ void __launch_bounds__(kPartials* kRowsPerBlock)
    short_rows_kernel(const __grid_constant__ RmsNormArgs args) {
    __shared__ float partials[kRowsPerBlock][kPartials];
    __shared__ float scales[kRowsPerBlock];
    const int lane = static_cast<int>(threadIdx.x), slot = static_cast<int>(threadIdx.y);
    const int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + slot;
    const int64_t width = row < args.num_tokens * args.num_heads ? args.width : 0;
    const Element* input =
        static_cast<const Element*>(args.input) + offset_of(args, args.input_strides, row);
    const Weight* weight = static_cast<const Weight*>(args.weight);
    Element* output =
        static_cast<Element*>(args.output) + offset_of(args, args.output_strides, row);
    Element* residual = static_cast<Element*>(args.residual);
    if (residual != nullptr) residual += offset_of(args, args.residual_strides, row);
    load_parameters(args);
    wait_for_predecessors();
    allow_dependents();

    // 1. Squares; with a residual, the sum that takes its place.
    float partial = 0.0f;
    for (int64_t column = lane; column < width; column += kPartials) {
        float x = to_float(input[column]);
        if (residual != nullptr) {
            residual[column] = from_float<Element>(__fadd_rn(x, to_float(residual[column])));
            x = to_float(residual[column]);
        }
        partial = __fmaf_rn(x, x, partial);
    }
    partials[slot][lane] = partial;
    __syncthreads();  // every partial sum is there
    if (lane < 16) {
        const float scale = scale_of(args, partials[slot], lane);
        if (lane == 0) scales[slot] = scale;
    }
    __syncthreads();  // the row's scale is there

    // 2. Scale. Each element is read by the thread that writes it: output may be input.
    const Element* source = residual != nullptr ? residual : input;
    for (int64_t column = lane; column < width; column += kPartials)
        output[column] =
            scaled<Element>(to_float(source[column]), scales[slot], to_float(weight[column]));
}

template <typename Element, typename Weight>
__global__ void __launch_bounds__(kThreads)
    long_rows_kernel(const __grid_constant__ RmsNormArgs args) {
    constexpr int kCount = kVectorBytes / sizeof(Element);
    using Elements = Vector<Element, kCount>;
    extern __shared__ __align__(16) float row_values[];  // [width], what is normalised
    __shared__ RowSums sums;
    const int64_t row = blockIdx.x;
    const int width = static_cast<int>(args.width), thread = static_cast<int>(threadIdx.x);
    const Element* input =
        static_cast<const Element*>(args.input) + offset_of(args, args.input_strides, row);
    Element* output =
        static_cast<Element*>(args.output) + offset_of(args, args.output_strides, row);
    Element* residual = static_cast<Element*>(args.residual);
    if (residual != nullptr) residual += offset_of(args, args.residual_strides, row);
    load_parameters(args);
    wait_for_predecessors();
    allow_dependents();

    // 1. The row; with a residual, the sum that takes its place. The first weights are on their way
    //    meanwhile.
    const int first_column = thread * kCount;
    const auto load_weights = [&](int column) {
        return Vector<Weight, kCount>::load(static_cast<const Weight*>(args.weight) + column);
    };
    Vector<Weight, kCount> w{};
    if (first_column < width) w = load_weights(first_column);
    for (int column = first_column; column < width; column += kThreads * kCount) {
        const Elements loaded = Elements::load(input + column);
        float x[kCount];
        if (residual != nullptr) {
            const Elements other = Elements::load(residual + column);
            loaded.to_floats(x);
            add_residual(x, other).store(residual + column);
        } else {
            loaded.to_floats(x);
        }
        Vector<float, kCount>::from_floats(x).store(row_values + column);
    }
    const float scale = scale_of_row(args, row_values, sums);

    // 2. Scale.
    for (int column = first_column; column < width; column += kThreads * kCount) {
        if (column != first_column) w = load_weights(column);
        store_scaled(row_values + column, scale, w, output + column);
    }
}

/// Whether every vector of 16 bytes of these rows is aligned.
bool is_aligned(const RmsNormArgs& args) {
    const auto fits = [&](const void* data, const HeadStrides& strides) {
        return are_rows_aligned(data, strides.token, args.dtype) &&
               (args.num_heads == 1 || are_rows_aligned(data, strides.head, args.dtype));
    };
    return args.width * static_cast<int64_t>(size_of(args.dtype)) % kVectorBytes == 0 &&
           reinterpret_cast<uintptr_t>(args.weight) % kVectorBytes == 0 &&
           fits(args.input, args.input_strides) && fits(args.output, args.output_strides) &&
           fits(args.residual, args.residual ? args.residual_strides : HeadStrides{});
}

template <typename Element, typename Weight>
void launch(const RmsNormArgs& args, Stream stream) {
    const int64_t num_rows = args.num_tokens * args.num_heads;
    constexpr int64_t kShortWidth = 4 * kPartials;
    if (args.width > kShortWidth && args.width <= kMaxStaged && is_aligned(args)) {
        const size_t shared_bytes = static_cast<size_t>(args.width) * sizeof(float);
        launch_dependent("rms_norm", long_rows_kernel<Element, Weight>,
                         dim3(static_cast<unsigned>(num_rows)), dim3(kThreads), shared_bytes,
                         stream, args);
        return;
    }
    const auto blocks = static_cast<unsigned>(ceil_div(num_rows, int64_t{kRowsPerBlock}));
    launch_dependent("rms_norm", short_rows_kernel<Element, Weight>, dim3(blocks),
                     dim3(kPartials, kRowsPerBlock), 0, stream, args);
}

}  // namespace

void rms_norm(const RmsNormArgs& args, Stream stream) {
    if (args.num_tokens * args.num_heads == 0) return;  // a grid of 0 blocks is a launch error
    if (args.dtype == DType::kFloat32)
        launch<float, float>(args, stream);
    else if (args.weight_dtype == DType::kFloat32)
        launch<__nv_bfloat16, float>(args, stream);
    else
        launch<__nv_bfloat16, __nv_bfloat16>(args, stream);
}

}  // namespace moecore::cuda
