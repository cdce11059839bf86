#include "moecore/kernels/topk_routing.hpp"

#include "cpu/kernel_table.hpp"
#include "cpu/parallel.hpp"

namespace moecore::cpu {

void topk_routing(const TopkRoutingArgs& args) {
    constexpr int64_t kTokensPerRange = 32;  // some 10 us of work: more than handing out a range
    const KernelTable& table = kernels();
    parallel_ranges(args.num_tokens, kTokensPerRange,
                    [&](int64_t begin, int64_t end) { table.route(args, begin, end); });
}

}  // namespace moecore::cpu
