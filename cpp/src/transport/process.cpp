#include "transport/process.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "moecore/error.hpp"

namespace moecore {
namespace {

/// State letter and start time of a process; false if there is none of this id.
bool read_stat(int32_t id, char& state, uint64_t& start_time) {
    std::FILE* file = std::fopen(concat("/proc/", id, "/stat").c_str(), "r");
    if (file == nullptr) return false;
    char text[1024];
    const size_t count = std::fread(text, 1, sizeof text - 1, file);
    std::fclose(file);
    text[count] = '\0';
    // The name in the second field may hold anything, so fields count from its closing bracket.
    const char* at = std::strrchr(text, ')');
    if (at == nullptr) return false;
    unsigned long long ticks = 0;
    if (std::sscanf(at + 1,
                    " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d "
                    "%llu",
                    &state, &ticks) != 2)
        return false;
    start_time = ticks;
    return true;
}

uint64_t own_namespace() {
    struct stat info{};
    return stat("/proc/self/ns/pid", &info) == 0 ? info.st_ino : 0;
}

}  // namespace

ProcessId ProcessId::current() {
    ProcessId self{.id = getpid(), .id_namespace = own_namespace()};
    char state = 0;
    read_stat(self.id, state, self.start_time);
    return self;
}

ProcessState state_of(const ProcessId& process) {
    if (process.id_namespace == 0 || process.id_namespace != own_namespace())
        return ProcessState::kUnknown;
    char state = 0;
    uint64_t start_time = 0;
    if (!read_stat(process.id, state, start_time) || start_time != process.start_time ||
        state == 'Z' || state == 'X')
        return ProcessState::kDead;
    return state == 'T' || state == 't' ? ProcessState::kStopped : ProcessState::kAlive;
}

}  // namespace moecore
