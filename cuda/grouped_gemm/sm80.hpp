#pragma once

#include "grouped_gemm/config.hpp"
#include "moecore/kernels/grouped_gemm.hpp"
#include "moecore/stream.hpp"

namespace moecore::cuda::sm80 {

/// On the current device, any since Ampere. REQUIRES: why_no_tensor_cores(args) == nullptr, rows
/// and groups.
void grouped_gemm(const GroupedGemmArgs& args, const GemmProblem& problem, Stream stream);

}  // namespace moecore::cuda::sm80
