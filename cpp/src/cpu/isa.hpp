#pragma once

#include <string>
#include <vector>

namespace moecore::cpu {

struct KernelTable;

/// The tables that are compiled in and run on this processor, slowest first.
std::vector<const KernelTable*> supported_kernels();

/// Why the operating system keeps this process from a table that the processor could run, or empty.
const std::string& isa_denied();

}  // namespace moecore::cpu
