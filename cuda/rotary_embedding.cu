// Rotary position embedding, in place.
//
//   reads   T * n * rotary_dim * sizeof(element) bytes of x, T * rotary_dim * 4 of cos_sin
//   writes  T * n * rotary_dim * sizeof(element) bytes of x
//
// One thread turns one pair of one head. Needs sm_80.

#include <cuda_bf16.h>

#include <cstdint>

#include "common/launch.cuh"
#include "common/math.cuh"
#include "moecore/kernels/rotary_embedding.hpp"

namespace moecore::cuda {
namespace {

constexpr int kThreads = 128;

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const __grid_constant__ RotaryEmbeddingArgs args) {
    const int64_t half = args.rotary_dim / 2;
    const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    load_parameters(args);
    wait_for_predecessors();
    allow_dependents();
    if (index >= args.num_tokens * args.num_heads * half) return;
    const int64_t pair = index % half;
    const int64_t head = index / half % args.num_heads;
    const int64_t token = index / half / args.num_heads;

    // A position outside the table must not read past it; NaN makes the mistake visible.
    const int64_t position = args.positions[token];
    float cosine = __uint_as_float(0x7fc00000u), sine = cosine;
    if (position >= 0 && position < args.num_positions) {
        cosine = args.cos_sin[position * args.cos_sin_stride + pair];
        sine = args.cos_sin[position * args.cos_sin_stride + half + pair];
    }
    const bool interleaved = args.pairs == RotaryPairs::kInterleaved;
    Element* row =
        static_cast<Element*>(args.x) + token * args.token_stride + head * args.head_stride;
    Element* first = row + (interleaved ? 2 * pair : pair);
    Element* second = row + (interleaved ? 2 * pair + 1 : pair + half);
    const float a = to_float(*first), b = to_float(*second);
    const float minus_sine = __fsub_rn(0.0f, sine);
    *first = from_float<Element>(__fmaf_rn(a, cosine, __fmul_rn(b, minus_sine)));
    *second = from_float<Element>(__fmaf_rn(b, cosine, __fmul_rn(a, sine)));
}

}  // namespace

void rotary_embedding(const RotaryEmbeddingArgs& args, Stream stream) {
    const int64_t num_pairs = args.num_tokens * args.num_heads * (args.rotary_dim / 2);
    if (num_pairs == 0) return;  // a grid of 0 blocks is a launch error
    const auto blocks = static_cast<unsigned>(ceil_div(num_pairs, int64_t{kThreads}));
    const auto kernel =
        args.dtype == DType::kBFloat16 ? rotary_kernel<__nv_bfloat16> : rotary_kernel<float>;
    launch_dependent("rotary_embedding", kernel, dim3(blocks), dim3(kThreads), 0, stream, args);
}

}  // namespace moecore::cuda
