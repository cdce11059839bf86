#pragma once

#include "grouped_gemm/config.hpp"
#include "moecore/kernels/grouped_gemm.hpp"
#include "moecore/stream.hpp"

namespace moecore::cuda::sm90 {

/// Why the sm_90a kernels cannot take a problem, or nullptr if they can. They need what the copy
/// engine needs: bfloat16, K contiguous, sizes that are multiples of 8 (N of a gated activation:
/// 16), and addresses and strides of input and weights that are multiples of 16 bytes.
const char* why_not(const GroupedGemmArgs& args);

/// The kernel that `config` names, on the current device. REQUIRES: why_not(args) == nullptr.
void grouped_gemm(const GroupedGemmArgs& args, const GemmConfig& config, Stream stream);

}  // namespace moecore::cuda::sm90
