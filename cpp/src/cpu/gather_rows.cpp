#include "moecore/kernels/gather_rows.hpp"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.hpp"

namespace moecore::cpu {

void gather_rows(const GatherRowsArgs& args) {
    constexpr int64_t kBytesPerRange = 64 * 1024;
    const char* input = static_cast<const char*>(args.input);
    char* output = static_cast<char*>(args.output);
    const int64_t grain = std::max<int64_t>(1, kBytesPerRange / args.row_bytes);
    parallel_ranges(args.num_outputs, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t index = args.index != nullptr ? args.index[i] : i;
            if (index < 0) continue;
            char* target = args.addresses != nullptr ? reinterpret_cast<char*>(args.addresses[i])
                                                     : output + i * args.output_stride;
            std::memcpy(target, input + index / args.slots_per_row * args.input_stride,
                        static_cast<size_t>(args.row_bytes));
        }
    });
}

}  // namespace moecore::cpu
