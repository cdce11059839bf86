#include "moecore/kernels/combine.hpp"

#include "cpu/kernel_table.hpp"
#include "cpu/parallel.hpp"

namespace moecore::cpu {

void combine(const CombineArgs& args) {
    constexpr int64_t kTokensPerRange = 8;
    const KernelTable& table = kernels();
    parallel_ranges(args.num_tokens, kTokensPerRange,
                    [&](int64_t begin, int64_t end) { table.combine(args, begin, end); });
}

}  // namespace moecore::cpu
