#include "moecore/kernels/rotary_embedding.hpp"

#include <algorithm>

#include "cpu/kernel_table.hpp"
#include "cpu/parallel.hpp"

namespace moecore::cpu {

void rotary_embedding(const RotaryEmbeddingArgs& args) {
    constexpr int64_t kElementsPerRange = 16 * 1024;
    const KernelTable& table = kernels();
    const int64_t width = std::max<int64_t>(1, args.num_heads * args.rotary_dim);
    const int64_t grain = std::max<int64_t>(1, kElementsPerRange / width);
    parallel_ranges(args.num_tokens, grain,
                    [&](int64_t begin, int64_t end) { table.rotary_embedding(args, begin, end); });
}

}  // namespace moecore::cpu
