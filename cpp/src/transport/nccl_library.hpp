#pragma once

// NCCL by name: loaded at first use, never linked. Declares the few functions and constants that
// are used, as every NCCL from 2.18 on has them.

#include <cstddef>
#include <source_location>
#include <string>
#include <vector>

namespace moecore {

struct NcclComm;

struct NcclUniqueId {
    char bytes[128];
};

/// The head of ncclConfig_t, which only grows at its end and begins with its size.
struct NcclConfig {
    size_t size = sizeof(NcclConfig);
    unsigned magic = 0xcafebeef;
    unsigned version = 21800;
    int blocking = 0;
    int cga_cluster_size = kDefault;
    int min_ctas = kDefault;
    int max_ctas = kDefault;
    const char* net_name = nullptr;
    int split_share = kDefault;

    static constexpr int kDefault = -2147483647 - 1;
};

inline constexpr int kNcclSuccess = 0;
inline constexpr int kNcclInProgress = 7;
inline constexpr int kNcclUint8 = 1;

struct NcclLibrary {
    std::string path;  ///< where it was found
    int version = 0;   ///< 22809 is 2.28.9

    int (*get_version)(int*);
    int (*get_unique_id)(NcclUniqueId*);
    int (*comm_init_rank_config)(NcclComm**, int, NcclUniqueId, int, NcclConfig*);
    int (*comm_split)(NcclComm*, int, int, NcclComm**, NcclConfig*);
    int (*comm_destroy)(NcclComm*);
    int (*comm_abort)(NcclComm*);
    int (*comm_get_async_error)(NcclComm*, int*);
    int (*group_start)();
    int (*group_end)();
    int (*send)(const void*, size_t, int, int, NcclComm*, void*);
    int (*recv)(void*, size_t, int, int, NcclComm*, void*);
    int (*all_gather)(const void*, void*, size_t, int, NcclComm*, void*);
    const char* (*get_error_string)(int);

    /// Throws NcclError, naming `call`, the error and the call site, unless `status` is success or
    /// in progress.
    void check(int status, const char* call,
               std::source_location where = std::source_location::current()) const;
};

/// The library, from the first of: MOECORE_NCCL, a copy already in the process, `paths` (where a
/// wheel is), the system. Throws UnsupportedError that lists what was tried. What the first caller
/// got, all get.
const NcclLibrary& nccl_library(const std::vector<std::string>& paths);

}  // namespace moecore
