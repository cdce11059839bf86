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
#include "common/math.cuh"
#include "moecore/kernels/rms_norm.hpp"

namespace moecore::cuda {
namespace {

constexpr int kPartials = 64;
constexpr int kRowsPerBlock = 4;
constexpr int kThreads = 256;                ///< of a long row's block
constexpr int64_t kMaxStaged = 12288 - 256;  ///< elements that shared memory holds, unasked
constexpr int kVectorBytes = 16;

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

/// round(weight * round(x * scale))
template <typename Element>
__device__ Element scaled(float x, float scale, float weight) {
    const Element rounded = from_float<Element>(__fmul_rn(x, scale));
    return from_float<Element>(__fmul_rn(weight, to_float(rounded)));
}

__device__ int64_t offset_of(const RmsNormArgs& args, const HeadStrides& strides, int64_t row) {
    return row / args.num_heads * strides.token + row % args.num_heads * strides.head;
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

/// kCount neighbouring elements, moved at once.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < kVectorBytes ? sizeof(T) * kCount : kVectorBytes) Vector {
    T element[kCount];
};

template <typename Element, typename Weight>
__global__ void __launch_bounds__(kThreads)
    long_rows_kernel(const __grid_constant__ RmsNormArgs args) {
    constexpr int kCount = kVectorBytes / sizeof(Element);
    using Elements = Vector<Element, kCount>;
    extern __shared__ float row_values[];  // [width], what is normalised
    __shared__ float partials[kPartials];
    __shared__ float scale;
    const int64_t row = blockIdx.x;
    const int width = static_cast<int>(args.width), thread = static_cast<int>(threadIdx.x);
    const Element* input =
        static_cast<const Element*>(args.input) + offset_of(args, args.input_strides, row);
    Element* output =
        static_cast<Element*>(args.output) + offset_of(args, args.output_strides, row);
    Element* residual = static_cast<Element*>(args.residual);
    if (residual != nullptr) residual += offset_of(args, args.residual_strides, row);
    wait_for_predecessors();
    allow_dependents();

    // 1. The row; with a residual, the sum that takes its place. The first weights are on their way
    //    meanwhile.
    const int first_column = thread * kCount;
    const auto load_weights = [&](int column) {
        return *reinterpret_cast<const Vector<Weight, kCount>*>(
            static_cast<const Weight*>(args.weight) + column);
    };
    Vector<Weight, kCount> w{};
    if (first_column < width) w = load_weights(first_column);
    for (int column = first_column; column < width; column += kThreads * kCount) {
        Elements x = *reinterpret_cast<const Elements*>(input + column);
        if (residual != nullptr) {
            auto* target = reinterpret_cast<Elements*>(residual + column);
            const Elements other = *target;
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                x.element[i] = from_float<Element>(
                    __fadd_rn(to_float(x.element[i]), to_float(other.element[i])));
            *target = x;
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) row_values[column + i] = to_float(x.element[i]);
    }
    __syncthreads();  // the row is there

    // 2. Its scale.
    if (thread < kPartials) {
        float partial = 0.0f;
#pragma unroll 8
        for (int column = thread; column < width; column += kPartials)
            partial = __fmaf_rn(row_values[column], row_values[column], partial);
        partials[thread] = partial;
    }
    __syncthreads();  // every partial sum is there
    if (thread < 16) {
        const float row_scale = scale_of(args, partials, thread);
        if (thread == 0) scale = row_scale;
    }
    __syncthreads();  // the scale is there

    // 3. Scale.
    for (int column = first_column; column < width; column += kThreads * kCount) {
        if (column != first_column) w = load_weights(column);
        Elements y;
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            y.element[i] = scaled<Element>(row_values[column + i], scale, to_float(w.element[i]));
        *reinterpret_cast<Elements*>(output + column) = y;
    }
}

/// Whether every vector of 16 bytes of these rows is aligned.
bool is_aligned(const RmsNormArgs& args) {
    const auto fits = [&](const void* data, const HeadStrides& strides) {
        const auto element = static_cast<int64_t>(size_of(args.dtype));
        return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
               strides.token * element % kVectorBytes == 0 &&
               (args.num_heads == 1 || strides.head * element % kVectorBytes == 0);
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
