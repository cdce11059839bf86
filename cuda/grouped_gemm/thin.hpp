#pragma once

#include "grouped_gemm/thin_config.hpp"
#include "moecore/kernels/grouped_gemm.hpp"
#include "moecore/stream.hpp"

namespace moecore::cuda::sm90 {

/// Whether the thin kernel takes a problem that the other sm_90a kernels take: one group, rows side
/// by side, K a multiple of 64.
bool is_thin(const GroupedGemmArgs& args);

/// The thin kernel, on the current device. REQUIRES: is_thin(args), and why_no_tensor_cores(args)
/// == nullptr.
void thin_gemm(const GroupedGemmArgs& args, const ThinConfig& config, Stream stream);

}  // namespace moecore::cuda::sm90
