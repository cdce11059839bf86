#include "transport/nccl_library.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <optional>

#include "moecore/error.hpp"

namespace moecore {
namespace {

constexpr int kOldest = 21800;
constexpr const char* kFileName = "libnccl.so.2";

/// dlopen, and what went wrong.
void* open_library(const std::string& path, int flags, std::string& tried) {
    void* handle = dlopen(path.c_str(), flags);
    if (handle == nullptr) {
        const char* error = dlerror();
        tried += concat("\n  ", path, (flags & RTLD_NOLOAD) != 0 ? " in this process" : "", ": ",
                        error == nullptr ? "not loaded" : error);
    }
    return handle;
}

void* find_library(const std::vector<std::string>& paths) {
    std::string tried;
    constexpr int kFlags = RTLD_NOW | RTLD_LOCAL;
    void* handle = nullptr;
    // An explicit path is obeyed, not taken as a hint.
    if (const char* chosen = std::getenv("MOECORE_NCCL"); chosen != nullptr && *chosen != '\0') {
        handle = open_library(chosen, kFlags, tried);
    } else {
        handle = open_library(kFileName, kFlags | RTLD_NOLOAD, tried);
        for (const std::string& path : paths)
            if (handle == nullptr) handle = open_library(path, kFlags, tried);
        if (handle == nullptr) handle = open_library(kFileName, kFlags, tried);
    }
    if (handle == nullptr)
        throw UnsupportedError(concat(
            "make_nccl_transport: found no NCCL. Install nvidia-nccl-cu13 (or -cu12), or set "
            "MOECORE_NCCL to the path of ",
            kFileName, ". Tried:", tried));
    return handle;
}

NcclLibrary load(const std::vector<std::string>& paths) {
    void* handle = find_library(paths);
    NcclLibrary library{};
    const auto resolve = [&](auto& function, const char* name) {
        void* symbol = dlsym(handle, name);
        if (symbol == nullptr)
            throw UnsupportedError(concat("make_nccl_transport: NCCL must have ", name,
                                          "; this copy has not. Install NCCL 2.18 or newer."));
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
    };
    resolve(library.get_version, "ncclGetVersion");
    resolve(library.get_unique_id, "ncclGetUniqueId");
    resolve(library.comm_init_rank_config, "ncclCommInitRankConfig");
    resolve(library.comm_split, "ncclCommSplit");
    resolve(library.comm_destroy, "ncclCommDestroy");
    resolve(library.comm_abort, "ncclCommAbort");
    resolve(library.comm_get_async_error, "ncclCommGetAsyncError");
    resolve(library.group_start, "ncclGroupStart");
    resolve(library.group_end, "ncclGroupEnd");
    resolve(library.send, "ncclSend");
    resolve(library.recv, "ncclRecv");
    resolve(library.all_gather, "ncclAllGather");
    resolve(library.get_error_string, "ncclGetErrorString");
    library.get_version(&library.version);
    Dl_info info{};
    if (dladdr(reinterpret_cast<void*>(library.get_version), &info) != 0 && info.dli_fname)
        library.path = info.dli_fname;
    if (library.version < kOldest)
        throw UnsupportedError(concat("make_nccl_transport: NCCL must be 2.18 or newer, got ",
                                      library.version, " from ", library.path));
    return library;
}

}  // namespace

void NcclLibrary::check(int status, const char* call, std::source_location where) const {
    if (status == kNcclSuccess || status == kNcclInProgress) return;
    throw NcclError(concat(call, ": ", get_error_string(status), " (NCCL ", version, " from ", path,
                           "; ", where.file_name(), ":", where.line(),
                           "). NCCL_DEBUG=INFO tells more."));
}

const NcclLibrary& nccl_library(const std::vector<std::string>& paths) {
    static std::mutex mutex;
    static std::optional<NcclLibrary> library;
    const std::lock_guard lock(mutex);
    if (!library) library = load(paths);
    return *library;
}

}  // namespace moecore
