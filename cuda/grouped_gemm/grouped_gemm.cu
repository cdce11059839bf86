// Grouped GEMM: chooses the kernel.
//
//   reads, writes  as the kernel says: sm90.cu, thin.cu, sm80.cu, simple.cu
//
// No kernel of its own, any architecture.

#include <cstdlib>
#include <string_view>

#include "common/launch.cuh"
#include "grouped_gemm/simple.hpp"
#include "grouped_gemm/sm80.hpp"
#include "grouped_gemm/sm90.hpp"
#include "grouped_gemm/tensor_cores.hpp"
#include "grouped_gemm/thin.hpp"

namespace moecore::cuda {
namespace {

enum class Choice : uint8_t { kAuto, kSimple, kSm80 };

/// MOECORE_CUDA_GEMM=simple takes the reference kernel everywhere, to compare with; sm80 takes that
/// of older GPUs on Hopper.
Choice chosen() {
    static const Choice choice = [] {
        const char* value = std::getenv("MOECORE_CUDA_GEMM");
        const std::string_view name = value == nullptr ? "" : value;
        if (name.empty() || name == "auto") return Choice::kAuto;
        if (name == "sm80") return Choice::kSm80;
        require(name == "simple", "MOECORE_CUDA_GEMM must be auto, simple or sm80, got ", name);
        return Choice::kSimple;
    }();
    return choice;
}

}  // namespace

void grouped_gemm(const GroupedGemmArgs& args, Stream stream) {
    if (args.is_packed)
        throw UnsupportedError("grouped_gemm: packed weights have no CUDA kernel, pass plain ones");
    if (args.num_rows == 0 || args.num_groups == 0) return;  // an empty grid is a launch error
    int device = 0, major = 0, minor = 0, num_multiprocessors = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
          "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    if (chosen() == Choice::kSimple || why_no_tensor_cores(args) != nullptr)
        return simple_grouped_gemm(args, stream);
    const GemmProblem problem{
        .num_rows = args.num_rows,
        .num_groups = args.num_groups,
        .n = args.n,
        .k_dim = args.k_dim,
        .is_gated = is_gated(args.config.activation),
        .num_multiprocessors = num_multiprocessors,
    };
    const bool is_hopper = major == 9 && minor == 0;
    if (!is_hopper || chosen() == Choice::kSm80) return sm80::grouped_gemm(args, problem, stream);
    if (sm90::is_thin(args)) {
        const ThinConfig config = choose_thin(problem);
        if (config.is_better) return sm90::thin_gemm(args, config, stream);
    }
    sm90::grouped_gemm(args, choose_config(problem), stream);
}

}  // namespace moecore::cuda
