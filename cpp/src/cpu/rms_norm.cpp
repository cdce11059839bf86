#include "moecore/kernels/rms_norm.hpp"

#include <algorithm>

#include "cpu/kernel_table.hpp"
#include "cpu/parallel.hpp"

namespace moecore::cpu {

void rms_norm(const RmsNormArgs& args) {
    constexpr int64_t kElementsPerRange = 16 * 1024;
    const KernelTable& table = kernels();
    const int64_t grain = std::max<int64_t>(1, kElementsPerRange / args.width);
    parallel_ranges(args.num_tokens * args.num_heads, grain,
                    [&](int64_t begin, int64_t end) { table.rms_norm(args, begin, end); });
}

}  // namespace moecore::cpu
