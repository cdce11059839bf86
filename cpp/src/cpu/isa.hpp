#pragma once

#include <string>
#include <vector>

namespace moecore::cpu {

struct KernelTable;

/// The tables that are compiled in and run on this processor, slowest first.
std::vector<const KernelTable*> supported_kernels();

}  // namespace moecore::cpu
