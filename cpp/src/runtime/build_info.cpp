#include "moecore/build_info.hpp"

#include "cpu/isa.hpp"
#include "cpu/kernel_table.hpp"
#include "moecore/error.hpp"
#include "moecore/kernels/memory.hpp"
#include "moecore/version.hpp"

namespace moecore {

BuildInfo build_info() {
    BuildInfo info;
    info.version = kVersion;
    info.compiler = concat("g++ ", __GNUC__, ".", __GNUC_MINOR__);
    info.cuda_version = cuda::toolkit_version();
    info.has_cuda = !info.cuda_version.empty();
    for (const cpu::KernelTable* table : cpu::supported_kernels())
        info.cpu_isas.emplace_back(table->name);
    info.cpu_isa = cpu::kernels().name;
    info.cpu_isa_denied = cpu::isa_denied();
    return info;
}

}  // namespace moecore
