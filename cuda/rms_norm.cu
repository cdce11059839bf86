// Root mean square norm of rows, with the residual's sum.
//
//   reads   T * n * N * sizeof(element) bytes of input (and of residual), and N of weight
//   writes  the same of output (and of residual)
//
// Sixty-four threads a row, four rows a block: thread p holds the partial sum of the elements p mod
// 64, as the CPU does. Needs sm_80.

#include <cuda_bf16.h>

#include <cstdint>

#include "common/launch.cuh"
#include "common/math.cuh"
#include "moecore/kernels/rms_norm.hpp"

namespace moecore::cuda {
namespace {

constexpr int kPartials = 64;
constexpr int kRowsPerBlock = 4;

template <typename Element, typename Weight>
__global__ void __launch_bounds__(kPartials* kRowsPerBlock)
    rms_norm_kernel(const __grid_constant__ RmsNormArgs args) {
    __shared__ float partials[kRowsPerBlock][kPartials];
    __shared__ float scales[kRowsPerBlock];
    const int lane = static_cast<int>(threadIdx.x);
    const int slot = static_cast<int>(threadIdx.y);
    const int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + slot;
    const bool is_row = row < args.num_tokens * args.num_heads;
    const auto offset_of = [&](const HeadStrides& strides) {
        return row / args.num_heads * strides.token + row % args.num_heads * strides.head;
    };
    const Element* input = static_cast<const Element*>(args.input) + offset_of(args.input_strides);
    Element* residual = static_cast<Element*>(args.residual);
    if (residual != nullptr) residual += offset_of(args.residual_strides);

    // 1. Squares; with a residual, the sum that takes its place.
    float partial = 0.0f;
    for (int64_t column = lane; is_row && column < args.width; column += kPartials) {
        float x = to_float(input[column]);
        if (residual != nullptr) {
            residual[column] = from_float<Element>(__fadd_rn(x, to_float(residual[column])));
            x = to_float(residual[column]);
        }
        partial = __fmaf_rn(x, x, partial);
    }
    partials[slot][lane] = partial;
    __syncthreads();  // every partial sum is there

    // 2. The CPU's tree: 64 sums to 16, then halves.
    if (lane < 16) {
        const float* p = partials[slot] + lane;
        float sum = __fadd_rn(__fadd_rn(p[0], p[16]), __fadd_rn(p[32], p[48]));
        for (int step = 8; step > 0; step /= 2)
            sum = __fadd_rn(sum, __shfl_down_sync(0xffffu, sum, step, 16));
        const float mean = __fdiv_rn(sum, static_cast<float>(args.width));
        if (lane == 0) scales[slot] = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, args.eps)));
    }
    __syncthreads();  // the row's scale is there
    if (!is_row) return;

    // 3. Scale. Each element is read by the thread that writes it: output may be input.
    const Element* source = residual != nullptr ? residual : input;
    const Weight* weight = static_cast<const Weight*>(args.weight);
    Element* output = static_cast<Element*>(args.output) + offset_of(args.output_strides);
    for (int64_t column = lane; column < args.width; column += kPartials) {
        const Element x = from_float<Element>(__fmul_rn(to_float(source[column]), scales[slot]));
        output[column] = from_float<Element>(__fmul_rn(to_float(weight[column]), to_float(x)));
    }
}

template <typename Element, typename Weight>
void launch(const RmsNormArgs& args, Stream stream) {
    const int64_t num_rows = args.num_tokens * args.num_heads;
    const auto blocks = static_cast<unsigned>(ceil_div(num_rows, int64_t{kRowsPerBlock}));
    rms_norm_kernel<Element, Weight>
        <<<blocks, dim3(kPartials, kRowsPerBlock), 0, native(stream)>>>(args);
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
    check(cudaPeekAtLastError(), "rms_norm launch");
}

}  // namespace moecore::cuda
