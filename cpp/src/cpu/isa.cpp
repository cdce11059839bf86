#include "cpu/isa.hpp"

#include <cstdlib>

#include "cpu/kernel_table.hpp"
#include "moecore/error.hpp"

namespace moecore::cpu {

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
    if (has_avx512 && __builtin_cpu_supports("avx512bf16"))
        tables.push_back(&avx512_bf16_kernels());
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
        throw InvalidArgument(
            concat("MOECORE_CPU_ISA must be one of ", names, " on this processor, got ", forced));
    }();
    return chosen;
}

}  // namespace moecore::cpu
