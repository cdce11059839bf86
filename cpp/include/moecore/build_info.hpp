#pragma once

#include <string>
#include <vector>

namespace moecore {

/// What this build holds, and what it chose on this machine.
struct BuildInfo {
    std::string version;
    std::string compiler;
    bool has_cuda = false;              ///< built with nvcc
    std::string cuda_version;           ///< of the toolkit, empty without CUDA
    std::vector<std::string> cpu_isas;  ///< compiled in and supported here, slowest first
    std::string cpu_isa;                ///< in use: the last of them, or MOECORE_CPU_ISA
    std::string cpu_isa_denied;         ///< which the system keeps from this process and why, or ""
};

/// Throws InvalidArgument if MOECORE_CPU_ISA names an instruction set that is not in `cpu_isas`.
BuildInfo build_info();

}  // namespace moecore
