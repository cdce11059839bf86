// Grouped GEMM: chooses the kernel.
//
//   reads, writes  as the kernel says: sm90.cu, thin.cu, sm80.cu, simple.cu
//
// No kernel of its own, any architecture.

#include <cstdlib>

#include "common/launch.cuh"
#include "grouped_gemm/simple.hpp"
#include "grouped_gemm/sm80.hpp"
#include "grouped_gemm/sm90.hpp"
#include "grouped_gemm/tensor_cores.hpp"
#include "grouped_gemm/thin.hpp"

namespace moecore::cuda {
namespace {

/// What MOECORE_CUDA_GEMM wants, read once.
GemmChoice chosen() {
    static const GemmChoice choice = [] {
        const char* name = std::getenv("MOECORE_CUDA_GEMM");
        return gemm_choice(name == nullptr ? "" : name);
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
    if (chosen() == GemmChoice::kSimple || why_no_tensor_cores(args) != nullptr)
        return simple_grouped_gemm(args, stream);
    const GemmProblem problem{
        .num_rows = args.expected_rows,
        .num_groups = args.num_groups,
        .n = args.n,
        .k_dim = args.k_dim,
        .is_gated = is_gated(args.config.activation),
        .num_multiprocessors = num_multiprocessors,
    };
    const bool is_hopper = major == 9 && minor == 0;
    if (!is_hopper || chosen() == GemmChoice::kSm80)
        return sm80::grouped_gemm(args, problem, stream);
    if (sm90::is_thin(args)) {
        const ThinConfig config = choose_thin(problem);
        if (config.is_better) return sm90::thin_gemm(args, config, stream);
    }
    sm90::grouped_gemm(args, choose_config(problem), stream);
}

}  // namespace moecore::cuda
