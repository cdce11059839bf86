#pragma once

#include "grouped_gemm/config.hpp"
#include "moecore/kernels/grouped_gemm.hpp"
#include "moecore/stream.hpp"

namespace moecore::cuda::sm90 {

/// The kernel that `config` names, on the current device. REQUIRES: why_no_tensor_cores(args) ==
/// nullptr.
void grouped_gemm(const GroupedGemmArgs& args, const GemmConfig& config, Stream stream);

}  // namespace moecore::cuda::sm90
