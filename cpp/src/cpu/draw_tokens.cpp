#include "moecore/kernels/draw_tokens.hpp"

#include "cpu/kernel_table.hpp"
#include "cpu/parallel.hpp"

namespace moecore::cpu {

void draw_tokens(const DrawTokensArgs& args) {
    constexpr int64_t kTokensPerRange = 32 * 1024;
    const int64_t grain = std::max<int64_t>(1, kTokensPerRange / args.vocab_size);
    parallel_ranges(args.num_rows, grain,
                    [&](int64_t begin, int64_t end) { kernels().draw_tokens(args, begin, end); });
}

}  // namespace moecore::cpu
