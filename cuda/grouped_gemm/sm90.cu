// Grouped GEMM for Hopper: wgmma, weights by the copy engine, rows gathered on the way in.
//
//   reads   N * K weights of every group with rows (again for each further tile or pair of tiles of
//           its rows, then mostly from L2), R * K input elements for every tile of weight rows,
//           mostly from L2
//   writes  R * N (gated: R * N / 2) elements
//
// Persistent blocks, or pairs of them, walk tiles of weight rows x rows. Weights are the first
// operand of wgmma and rows the second, so a tile has any multiple of 8 or 16 rows, and one kernel
// serves decode and prefill. Every output is one accumulator that runs through K in order: its bits
// depend on neither tile nor batch. Needs sm_90a.

#include "grouped_gemm/sm90.hpp"

#include <array>

#include "grouped_gemm/sm90_kernel.cuh"
#include "grouped_gemm/tensor_cores.hpp"
#include "grouped_gemm/tensor_map.hpp"

namespace moecore::cuda::sm90 {
namespace {

/// Elements. Measured on an H200: where tiles are read at memory's speed, shorter rows of weights
/// prefer 128 bytes of promotion and two K blocks asked for together, longer ones 256 and one.
constexpr int64_t kLongRow = 4096;

using Slim = TileShape<1, 1, 32, 8, 4, 2, 1>;
using Narrow = TileShape<2, 1, 64, 8, 4, 2, 1>;
using Wide = TileShape<2, 2, 192, 16, 1, 1, 1>;
using Pair = TileShape<2, 2, 192, 16, 1, 1, 2>;

/// Weights as {K, 8 rows, halves or eights, eights, groups}. Gated: eight rows of gate and the same
/// eight of up take turns, whatever their order in memory, so that both sums of a feature reach one
/// thread.
CUtensorMap map_weights(const GroupedGemmArgs& args, int weight_rows, bool is_read_once) {
    const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
    const bool gated = is_gated(args.config.activation);
    const bool is_interleaved = args.config.gate_order == GateOrder::kInterleaved;
    const int64_t row = args.n_stride * 2;  // bytes
    const int64_t features = args.n / 2;
    const std::array<cuuint64_t, 5> sizes = {size(args.k_dim), 8, size(gated ? 2 : args.n / 8),
                                             size(gated ? features / 8 : 1), size(args.num_groups)};
    const int64_t feature = gated && is_interleaved ? 2 * row : row;
    const int64_t half = is_interleaved ? row : features * row;
    const int64_t group = args.num_groups > 1 ? args.group_stride * 2 : args.n * row;
    const std::array<cuuint64_t, 4> strides = {size(feature), size(gated ? half : 8 * row),
                                               size(8 * feature), size(group)};
    const auto eights = static_cast<cuuint32_t>(weight_rows / 8);
    const std::array<cuuint32_t, 5> box = {BLOCK_K, 8, gated ? 2 : eights, gated ? eights / 2 : 1,
                                           1};
    const bool is_promoted = args.k_dim >= kLongRow || !is_read_once;
    return encode_map(
        args.weights, sizes, strides, box, "weights", args.n, args.k_dim,
        is_promoted ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

/// Input as {K, rows}, for rows that lie side by side.
CUtensorMap map_rows(const GroupedGemmArgs& args) {
    const std::array<cuuint64_t, 2> sizes = {static_cast<cuuint64_t>(args.k_dim),
                                             static_cast<cuuint64_t>(args.num_input_rows)};
    const std::array<cuuint64_t, 1> strides = {static_cast<cuuint64_t>(args.input_stride * 2)};
    const std::array<cuuint32_t, 2> box = {BLOCK_K, kBoxRows};
    return encode_map(args.input, sizes, strides, box, "input", args.num_input_rows, args.k_dim);
}

template <Activation kActivation, typename Shape>
void launch(const GroupedGemmArgs& args, const GemmConfig& config, Stream stream) {
    Params params{};
    params.args = args;
    params.num_stages = config.num_stages;
    params.stage_bytes = Shape::kWeightBytes + config.max_tokens * kRowBytes;
    params.num_k_blocks = static_cast<int>(ceil_div(args.k_dim, BLOCK_K));
    params.is_output_aligned = args.row_addresses != nullptr ||
                               (is_multiple_of_16(args.output) && args.output_stride % 8 == 0);
    const bool are_weights_shared =
        args.expected_rows > int64_t{config.max_tokens} * args.num_groups;
    // Weights of wide tiles that were to leave L2 first took up to 4 percent longer, also where no
    // tile wants them again, and those of smaller tiles up to 7 percent less (measured on an H200).
    params.keeps_weights = are_weights_shared || Shape::kBlocks > 1;
    // A stage given back early keeps the memory busy, products in the queue the tensor cores: that
    // pays where products take little of the time.
    constexpr int kShortProducts = 32, kFewRows = 128;
    params.frees_early = Shape::kBlocks == 1
                             ? !are_weights_shared && config.max_tokens > kShortProducts
                             : config.max_tokens >= kFewRows;
    params.copies_rows =
        Shape::kBlocks > 1 && args.sorted_slots == nullptr && config.max_tokens % kBoxRows == 0;
    params.begins_early = Shape::kCluster == 1 && args.settled != Settled::kNothing;
    params.asks_for_two = Shape::kBlocks == 1 && args.k_dim < kLongRow && params.num_stages >= 4;
    params.grid.expert_offsets = args.expert_offsets;
    params.grid.num_groups = args.num_groups;
    params.grid.num_rows = static_cast<int>(args.num_rows);
    params.grid.max_tokens = config.max_tokens;
    params.grid.num_weight_tiles = static_cast<int>(ceil_div(args.n, Shape::kWeightRows));
    params.grid.sharing = ceil_div(config.sharing, Shape::kCluster);

    int device = 0, num_multiprocessors = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    const auto kernel = grouped_gemm_kernel<kActivation, Shape>;
    const int shared_bytes = params.num_stages * params.stage_bytes + kRingAlignment;
    // The most that any launch takes: another thread may launch the same kernel at this moment.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(ring_bytes(config.kernel)) + kRingAlignment),
          "cudaFuncSetAttribute");
    // Every group that has rows can end in one tile that is not full.
    const int64_t most_sets = (args.num_rows / (config.max_tokens * Shape::kCluster) +
                               std::min<int64_t>(args.num_rows, args.num_groups)) *
                              params.grid.num_weight_tiles;
    const int64_t clusters = std::min<int64_t>(
        most_sets, num_multiprocessors * Shape::kResidentBlocks / Shape::kCluster);
    params.claims_tiles = args.work_counters != nullptr && most_sets > clusters;
    launch_dependent_clusters(
        "grouped_gemm", kernel, dim3(static_cast<unsigned>(clusters * Shape::kCluster)),
        dim3(Shape::kThreads), Shape::kCluster, static_cast<size_t>(shared_bytes), stream, params,
        map_weights(args, Shape::kWeightRows / Shape::kCluster, Shape::kBlocks == 1),
        params.copies_rows ? map_rows(args) : CUtensorMap{});
}

template <typename Shape>
void launch_shape(const GroupedGemmArgs& args, const GemmConfig& config, Stream stream) {
    switch (args.config.activation) {
        case Activation::kNone:
            return launch<Activation::kNone, Shape>(args, config, stream);
        case Activation::kSwiglu:
            return launch<Activation::kSwiglu, Shape>(args, config, stream);
        case Activation::kClampedSwiglu:
            return launch<Activation::kClampedSwiglu, Shape>(args, config, stream);
        case Activation::kGeluTanh:
            return launch<Activation::kGeluTanh, Shape>(args, config, stream);
    }
}

}  // namespace

void grouped_gemm(const GroupedGemmArgs& args, const GemmConfig& config, Stream stream) {
    if (config.kernel == GemmKernel::kPair) return launch_shape<Pair>(args, config, stream);
    if (config.kernel == GemmKernel::kWide) return launch_shape<Wide>(args, config, stream);
    if (config.kernel == GemmKernel::kSlim) return launch_shape<Slim>(args, config, stream);
    return launch_shape<Narrow>(args, config, stream);
}

}  // namespace moecore::cuda::sm90
