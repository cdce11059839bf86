// Products of one group with few weight rows, for Hopper: small tiles, one for each multiprocessor.
//
//   reads   N * K weights for every tile of rows and R * K input elements for every tile of weight
//           rows, again mostly from L2
//   writes  R * N (gated: R * N / 2) elements
//
// A projection of a decoder layer is a few MB: what counts is how soon all multiprocessors read.
// So weights are requested before the kernel ahead has ended, where the caller says that it does
// not write them. The products and their order along K are those of sm90.cu: the same bits. Needs
// sm_90a.

#include "grouped_gemm/thin.hpp"

#include <array>

#include "grouped_gemm/tensor_cores.hpp"
#include "grouped_gemm/tensor_map.hpp"
#include "grouped_gemm/thin_kernel.cuh"

namespace moecore::cuda::sm90 {
namespace {

cuuint64_t size(int64_t value) { return static_cast<cuuint64_t>(value); }

/// Weights as {64 of K, 8 rows, halves or eights, eights, K blocks}; gated: eight rows of gate and
/// the same eight of up take turns. A box is stage_depth K blocks, each as wgmma wants it.
CUtensorMap map_weights(const GroupedGemmArgs& args, const ThinConfig& config) {
    const bool gated = is_gated(args.config.activation);
    const bool is_interleaved = args.config.gate_order == GateOrder::kInterleaved;
    const int64_t row = args.n_stride * 2;  // bytes
    const int64_t features = args.n / 2;
    const std::array<cuuint64_t, 5> sizes = {BLOCK_K, 8, size(gated ? 2 : args.n / 8),
                                             size(gated ? features / 8 : 1),
                                             size(args.k_dim / BLOCK_K)};
    const int64_t feature = gated && is_interleaved ? 2 * row : row;
    const int64_t half = is_interleaved ? row : features * row;
    const std::array<cuuint64_t, 4> strides = {size(feature), size(gated ? half : 8 * row),
                                               size(8 * feature), kRowBytes};
    const auto eights = static_cast<cuuint32_t>(config.weight_rows / 8);
    const std::array<cuuint32_t, 5> box = {BLOCK_K, 8, gated ? 2 : eights, gated ? eights / 2 : 1,
                                           static_cast<cuuint32_t>(config.stage_depth)};
    return encode_map(args.weights, sizes, strides, box, "weights", args.n, args.k_dim);
}

/// Input as {64 of K, rows, K blocks, 1, 1}.
CUtensorMap map_rows(const GroupedGemmArgs& args, const ThinConfig& config) {
    const std::array<cuuint64_t, 5> sizes = {BLOCK_K, size(args.num_rows),
                                             size(args.k_dim / BLOCK_K), 1, 1};
    const std::array<cuuint64_t, 4> strides = {size(args.input_stride * 2), kRowBytes, kRowBytes,
                                               kRowBytes};
    const std::array<cuuint32_t, 5> box = {BLOCK_K, static_cast<cuuint32_t>(config.max_tokens),
                                           static_cast<cuuint32_t>(config.stage_depth), 1, 1};
    return encode_map(args.input, sizes, strides, box, "input", args.num_rows, args.k_dim);
}

template <Activation kActivation>
void launch(const GroupedGemmArgs& args, const ThinConfig& config, Stream stream) {
    ThinParams params{};
    params.args = args;
    params.config = config;
    params.stage_bytes = config.stage_depth * (config.weight_rows + config.max_tokens) * kRowBytes;
    params.num_k_blocks = static_cast<int>(args.k_dim / BLOCK_K);
    params.is_output_aligned = is_multiple_of_16(args.output) && args.output_stride % 8 == 0;
    params.are_weights_shared = args.num_rows > config.max_tokens;

    constexpr int kExtra = kWgmmaBytes + 1024;  // what wgmma reads past the ring, and alignment
    const auto kernel = thin_gemm_kernel<kActivation>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kThinRingBytes) + kExtra),
          "cudaFuncSetAttribute");
    // Its memory also stages the output: 4 KiB a warp.
    const int ring_bytes = std::max(config.num_stages * params.stage_bytes, 4 * 4096);
    const dim3 grid(static_cast<unsigned>(ceil_div(args.n, config.weight_rows)),
                    static_cast<unsigned>(ceil_div(args.num_rows, config.max_tokens)));
    launch_dependent("grouped_gemm", kernel, grid, dim3(kThinThreads),
                     static_cast<size_t>(ring_bytes + kExtra), stream, params,
                     map_weights(args, config), map_rows(args, config));
}

}  // namespace

bool is_thin(const GroupedGemmArgs& args) {
    return args.expert_offsets == nullptr && args.sorted_slots == nullptr &&
           args.k_dim % BLOCK_K == 0;
}

void thin_gemm(const GroupedGemmArgs& args, const ThinConfig& config, Stream stream) {
    switch (args.config.activation) {
        case Activation::kNone:
            return launch<Activation::kNone>(args, config, stream);
        case Activation::kSwiglu:
            return launch<Activation::kSwiglu>(args, config, stream);
        case Activation::kClampedSwiglu:
            return launch<Activation::kClampedSwiglu>(args, config, stream);
        case Activation::kGeluTanh:
            return launch<Activation::kGeluTanh>(args, config, stream);
    }
}

}  // namespace moecore::cuda::sm90
