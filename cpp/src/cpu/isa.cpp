#include "cpu/isa.hpp"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "cpu/kernel_table.hpp"
#include "moecore/error.hpp"

namespace moecore::cpu {
namespace {

#if defined(__x86_64__)
/// Tiles are 8 KB of state a thread, which Linux saves only for processes that ask for it. Returns
/// why it refuses, or an empty string.
std::string ask_for_tiles() {
    constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
    if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0) return "";
    return concat("amx: the operating system refuses tiles: arch_prctl(ARCH_REQ_XCOMP_PERM): ",
                  std::strerror(errno));
}

bool has_amx() { return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16"); }
#endif

}  // namespace

const std::string& isa_denied() {
#if defined(__x86_64__)
    static const std::string reason = has_amx() ? ask_for_tiles() : "";
#else
    static const std::string reason;
#endif
    return reason;
}

std::vector<const KernelTable*> supported_kernels() {
    std::vector<const KernelTable*> tables{&scalar_kernels()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        tables.push_back(&avx2_kernels());
    const bool has_avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512) tables.push_back(&avx512_kernels());
    const bool has_avx512_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    if (has_avx512_bf16) tables.push_back(&avx512_bf16_kernels());
    if (has_avx512_bf16 && has_amx() && isa_denied().empty()) tables.push_back(&amx_kernels());
#endif
    return tables;
}

const KernelTable& kernels() {
    // A throwing initialiser runs again at the next call, so a wrong name fails every op alike.
    static const KernelTable& chosen = []() -> const KernelTable& {
        const auto tables = supported_kernels();
        const char* forced = std::getenv("MOECORE_CPU_ISA");
        if (forced == nullptr || *forced == '\0') return *tables.back();
        std::string names;
        for (const KernelTable* table : tables) {
            if (std::string(table->name) == forced) return *table;
            names += (names.empty() ? "" : ", ") + std::string(table->name);
        }
        throw InvalidArgument(concat("MOECORE_CPU_ISA must be one of ", names,
                                     " on this processor, got ", forced,
                                     isa_denied().empty() ? "" : "; ", isa_denied()));
    }();
    return chosen;
}

}  // namespace moecore::cpu
