// Grouped GEMM for every GPU since Ampere: mma.sync, asynchronous copies, rows gathered on the way
// in.
//
//   reads   N * K weights of every group with rows (again for each further tile of its rows, then
//           mostly from L2), R * K input elements for every tile of weight rows, mostly from L2
//   writes  R * N (gated: R * N / 2) elements
//
// Persistent blocks walk tiles of weight rows x rows. Weights are the first operand and rows the
// second, in every shape of tile, and every output is one accumulator that runs through K in steps
// of 16: its bits depend on neither tile nor batch. Needs sm_80.

#include "grouped_gemm/sm80.hpp"

#include "grouped_gemm/sm80_kernel.cuh"
#include "grouped_gemm/tensor_cores.hpp"

namespace moecore::cuda::sm80 {
namespace {

struct Device {
    int num_multiprocessors, shared_bytes, cache_bytes;
};

Device current_device() {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const auto attribute = [&](cudaDeviceAttr name) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
        return value;
    };
    return {attribute(cudaDevAttrMultiProcessorCount),
            attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
            attribute(cudaDevAttrL2CacheSize)};
}

template <Activation kActivation, typename Shape>
void launch(const GroupedGemmArgs& args, const Config& config, const Device& device,
            Stream stream) {
    constexpr bool kIsGated = kActivation != Activation::kNone;
    constexpr int kMostKSteps = 64;  // K blocks of all shapes end at its multiples: same steps
    constexpr int kRowsPerPass = Shape::kThreads / (Shape::BLOCK_K / 8);
    const bool is_halved = kIsGated && args.config.gate_order != GateOrder::kInterleaved;
    Params params{};
    params.args = args;
    params.stage_bytes = Shape::stage_bytes(config.max_tokens);
    params.num_k_blocks =
        static_cast<int>(ceil_div(args.k_dim, kMostKSteps)) * (kMostKSteps / Shape::BLOCK_K);
    params.weight_step = 2 * args.n_stride * (is_halved ? kRowsPerPass / 2 : kRowsPerPass);
    params.is_output_aligned = args.row_addresses != nullptr ||
                               (is_multiple_of_16(args.output) && args.output_stride % 8 == 0);
    params.grid.expert_offsets = args.expert_offsets;
    params.grid.num_groups = args.num_groups;
    params.grid.num_rows = static_cast<int>(args.num_rows);
    params.grid.max_tokens = config.max_tokens;
    params.grid.num_weight_tiles = static_cast<int>(ceil_div(args.n, Shape::kWeightRows));
    params.grid.sharing = config.sharing;

    // Every group that has rows can end in one tile that is not full.
    const int64_t most_tiles =
        (args.num_rows / config.max_tokens + std::min<int64_t>(args.num_rows, args.num_groups)) *
        params.grid.num_weight_tiles;
    constexpr int kOfSystem = 1024;  // bytes of each block
    const int ring_bytes = Shape::ring_bytes(config.max_tokens);
    const int block_bytes = ring_bytes + static_cast<int>(sizeof(Shared<Shape>)) + kOfSystem;
    const int resident = std::clamp(device.shared_bytes / block_bytes, 1, Shape::kResidentBlocks);
    const int64_t blocks =
        std::min<int64_t>(most_tiles, int64_t{device.num_multiprocessors} * resident);
    params.claims_tiles = args.work_counters != nullptr && most_tiles > blocks;

    const auto kernel = grouped_gemm_kernel<kActivation, Shape>;
    // The most that any launch takes: another thread may launch the same kernel at this moment.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Shape::ring_bytes(Shape::kMaxTokens)),
          "cudaFuncSetAttribute");
    launch_dependent("grouped_gemm", kernel, dim3(static_cast<unsigned>(blocks)),
                     dim3(Shape::kThreads), static_cast<size_t>(ring_bytes), stream, params);
}

template <typename Shape>
void launch_shape(const GroupedGemmArgs& args, const Config& config, const Device& device,
                  Stream stream) {
    switch (args.config.activation) {
        case Activation::kNone:
            return launch<Activation::kNone, Shape>(args, config, device, stream);
        case Activation::kSwiglu:
            return launch<Activation::kSwiglu, Shape>(args, config, device, stream);
        case Activation::kClampedSwiglu:
            return launch<Activation::kClampedSwiglu, Shape>(args, config, device, stream);
        case Activation::kGeluTanh:
            return launch<Activation::kGeluTanh, Shape>(args, config, device, stream);
    }
}

}  // namespace

void grouped_gemm(const GroupedGemmArgs& args, const GemmProblem& problem, Stream stream) {
    const Device device = current_device();
    const Config config = choose(problem, device.cache_bytes);
    switch (config.tiles) {
        case Tiles::kNarrow:
            return launch_shape<Narrow>(args, config, device, stream);
        case Tiles::kMedium:
            return launch_shape<Medium>(args, config, device, stream);
        case Tiles::kWide:
            return launch_shape<Wide>(args, config, device, stream);
    }
}

}  // namespace moecore::cuda::sm80
