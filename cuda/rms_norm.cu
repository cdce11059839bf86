// Root mean square norm of rows, with the residual's sum.
//
//   reads   T * n * N * sizeof(element) bytes of input (and of residual), and N of weight
//   writes  the same of output (and of residual)
//
// Sixty-four threads a row, four rows a block: thread p holds the partial sum of the elements p mod
// 64, as the CPU does. Rows of up to 4096 elements stay in registers, longer ones are read twice
// (the second time from cache). Needs sm_80.

#include <cuda_bf16.h>

#include <cstdint>
#include <utility>

#include "common/launch.cuh"
#include "common/math.cuh"
#include "moecore/kernels/rms_norm.hpp"

namespace moecore::cuda {
namespace {

constexpr int kPartials = 64;
constexpr int kRowsPerBlock = 4;

/// 1 / sqrt(mean of squares + eps) of the row whose partial sums these are, by the CPU's tree: 64
/// sums to 16, then halves. Every thread of the block calls it.
__device__ float row_scale(const RmsNormArgs& args, float partial) {
    __shared__ float partials[kRowsPerBlock][kPartials];
    __shared__ float scales[kRowsPerBlock];
    const int lane = static_cast<int>(threadIdx.x), slot = static_cast<int>(threadIdx.y);
    partials[slot][lane] = partial;
    __syncthreads();  // every partial sum is there
    if (lane < 16) {
        const float* p = partials[slot] + lane;
        float sum = __fadd_rn(__fadd_rn(p[0], p[16]), __fadd_rn(p[32], p[48]));
        for (int step = 8; step > 0; step /= 2)
            sum = __fadd_rn(sum, __shfl_down_sync(0xffffu, sum, step, 16));
        const float mean = __fdiv_rn(sum, static_cast<float>(args.width));
        if (lane == 0) scales[slot] = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, args.eps)));
    }
    __syncthreads();  // the row's scale is there
    return scales[slot];
}

/// kPerThread: elements of a thread, at least width / 64; 0 for any width.
template <int kPerThread, typename Element, typename Weight>
__global__ void __launch_bounds__(kPartials* kRowsPerBlock)
    rms_norm_kernel(const __grid_constant__ RmsNormArgs args) {
    const int lane = static_cast<int>(threadIdx.x);
    const int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.y;
    const int64_t width = row < args.num_tokens * args.num_heads ? args.width : 0;
    const auto offset_of = [&](const HeadStrides& strides) {
        return row / args.num_heads * strides.token + row % args.num_heads * strides.head;
    };
    const Element* input = static_cast<const Element*>(args.input) + offset_of(args.input_strides);
    const Weight* weight = static_cast<const Weight*>(args.weight);
    Element* output = static_cast<Element*>(args.output) + offset_of(args.output_strides);
    Element* residual = static_cast<Element*>(args.residual);
    if (residual != nullptr) residual += offset_of(args.residual_strides);
    const auto scaled = [&](float x, float scale, int64_t column) {
        const Element rounded = from_float<Element>(__fmul_rn(x, scale));
        return from_float<Element>(__fmul_rn(to_float(weight[column]), to_float(rounded)));
    };
    // x + other, rounded, which is also stored.
    const auto added = [](float x, Element other, Element& sum) {
        sum = from_float<Element>(__fadd_rn(x, to_float(other)));
        return to_float(sum);
    };
    wait_for_predecessors();
    allow_dependents();

    // Each element is read by the thread that writes it: output may be input.
    float partial = 0.0f;
    if constexpr (kPerThread > 0) {
        float x[kPerThread];
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            const int64_t column = i * kPartials + lane;
            x[i] = column < width ? to_float(input[column]) : 0.0f;
        }
        if (residual != nullptr) {
            Element other[kPerThread];  // all asked for before the first is stored
#pragma unroll
            for (int i = 0; i < kPerThread; ++i)
                if (i * kPartials + lane < width) other[i] = residual[i * kPartials + lane];
#pragma unroll
            for (int i = 0; i < kPerThread; ++i)
                if (i * kPartials + lane < width)
                    x[i] = added(x[i], other[i], residual[i * kPartials + lane]);
        }
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
            if (i * kPartials + lane < width) partial = __fmaf_rn(x[i], x[i], partial);
        const float scale = row_scale(args, partial);
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            const int64_t column = i * kPartials + lane;
            if (column < width) output[column] = scaled(x[i], scale, column);
        }
    } else {
        for (int64_t column = lane; column < width; column += kPartials) {
            float x = to_float(input[column]);
            if (residual != nullptr) x = added(x, residual[column], residual[column]);
            partial = __fmaf_rn(x, x, partial);
        }
        const float scale = row_scale(args, partial);
        const Element* source = residual != nullptr ? residual : input;
        for (int64_t column = lane; column < width; column += kPartials)
            output[column] = scaled(to_float(source[column]), scale, column);
    }
}

template <typename Element, typename Weight>
void launch(const RmsNormArgs& args, Stream stream) {
    const int64_t num_rows = args.num_tokens * args.num_heads;
    const dim3 grid(static_cast<unsigned>(ceil_div(num_rows, int64_t{kRowsPerBlock})));
    const dim3 block(kPartials, kRowsPerBlock);
    const auto start = [&](auto per_thread) {
        launch_dependent("rms_norm", rms_norm_kernel<per_thread(), Element, Weight>, grid, block, 0,
                         stream, args);
    };
    const int64_t needed = ceil_div(args.width, int64_t{kPartials});
    const bool in_registers =
        needed <= 64 &&
        dispatch_at_least(static_cast<int>(needed), std::integer_sequence<int, 4, 32, 64>{}, start);
    if (!in_registers) start(std::integral_constant<int, 0>{});
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
