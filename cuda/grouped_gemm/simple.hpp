#pragma once

#include "moecore/kernels/grouped_gemm.hpp"
#include "moecore/stream.hpp"

namespace moecore::cuda {

/// Plain weights of any size and stride, by float32 multiplications. REQUIRES: rows and groups.
void simple_grouped_gemm(const GroupedGemmArgs& args, Stream stream);

}  // namespace moecore::cuda
