// Grouped GEMM: chooses the kernel.
//
//   reads, writes  as the kernel says: sm90.cu, thin.cu, simple.cu
//
// No kernel of its own, any architecture.

#include <cstdlib>
#include <string_view>

#include "common/launch.cuh"
#include "grouped_gemm/simple.hpp"
#include "grouped_gemm/sm90.hpp"
#include "grouped_gemm/thin.hpp"

namespace moecore::cuda {
namespace {

/// MOECORE_CUDA_GEMM=simple takes the reference kernel everywhere, to compare with.
bool wants_simple() {
    static const bool wanted = [] {
        const char* name = std::getenv("MOECORE_CUDA_GEMM");
        if (name == nullptr || *name == '\0' || std::string_view(name) == "auto") return false;
        require(std::string_view(name) == "simple",
                "MOECORE_CUDA_GEMM must be auto or simple, got ", name);
        return true;
    }();
    return wanted;
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
    const bool is_hopper = major == 9 && minor == 0;
    if (!is_hopper || wants_simple() || sm90::why_not(args) != nullptr)
        return simple_grouped_gemm(args, stream);
    const GemmProblem problem{
        .num_rows = args.num_rows,
        .num_groups = args.num_groups,
        .n = args.n,
        .k_dim = args.k_dim,
        .is_gated = is_gated(args.config.activation),
        .num_multiprocessors = num_multiprocessors,
    };
    if (sm90::is_thin(args)) {
        const ThinConfig config = choose_thin(problem);
        if (config.is_better) return sm90::thin_gemm(args, config, stream);
    }
    sm90::grouped_gemm(args, choose_config(problem), stream);
}

}  // namespace moecore::cuda
