#pragma once

#include <cstdint>
#include <string>

namespace moecore {

/// Names a process for others on this host, beyond the life of its id.
struct ProcessId {
    int32_t id = 0;
    uint64_t start_time = 0;    ///< in clock ticks since boot
    uint64_t id_namespace = 0;  ///< ids of other namespaces say nothing

    static ProcessId current();
};

enum class ProcessState {
    kUnknown,  ///< of another namespace
    kAlive,
    kStopped,  ///< by SIGSTOP or a debugger
    kDead,
};

ProcessState state_of(const ProcessId& process);

}  // namespace moecore
