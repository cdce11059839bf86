// Rows of a matrix by their ids.
//
//   reads   T * K * sizeof(element) bytes of weight, T ids
//   writes  T * K * sizeof(element) bytes of output
//
// One block a row and 1024 of its columns. Needs sm_80.

#include <cuda_bf16.h>

#include <cstdint>

#include "common/launch.cuh"
#include "common/math.cuh"
#include "moecore/kernels/embedding.hpp"

namespace moecore::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumnsPerBlock = 1024;

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const __grid_constant__ EmbeddingArgs args) {
    const int64_t token = blockIdx.x;
    allow_dependents();
    const int64_t id = args.ids_dtype == DType::kInt32
                           ? static_cast<const int32_t*>(args.ids)[token]
                           : static_cast<const int64_t*>(args.ids)[token];
    // An id outside the matrix must not read past it; NaN makes the mistake visible.
    const bool is_row = id >= 0 && id < args.num_rows;
    const Element nan = from_float<Element>(__uint_as_float(0x7fc00000u));
    const Element* source =
        static_cast<const Element*>(args.weight) + (is_row ? id * args.weight_stride : 0);
    Element* target = static_cast<Element*>(args.output) + token * args.output_stride;
    const int64_t begin = int64_t{blockIdx.y} * kColumnsPerBlock;
    const int64_t end = min(begin + kColumnsPerBlock, args.width);
    for (int64_t column = begin + threadIdx.x; column < end; column += kThreads)
        target[column] = is_row ? source[column] : nan;
}

}  // namespace

void embedding(const EmbeddingArgs& args, Stream stream) {
    if (args.num_tokens == 0) return;  // a grid of 0 blocks is a launch error
    const dim3 grid(static_cast<unsigned>(args.num_tokens),
                    static_cast<unsigned>(ceil_div(args.width, int64_t{kColumnsPerBlock})));
    const auto kernel =
        args.dtype == DType::kBFloat16 ? embedding_kernel<__nv_bfloat16> : embedding_kernel<float>;
    // Launched plainly: the first kernel of a pass follows copies from the host, and begins only
    // when nothing before it is under way.
    kernel<<<grid, kThreads, 0, native(stream)>>>(args);
    check(cudaPeekAtLastError(), "embedding launch");
}

}  // namespace moecore::cuda
