// Rows that cross to other ranks of this process: where they go, and those that go to all.

#include <cstring>

#include "cpu/parallel.hpp"
#include "moecore/kernels/address_rows.hpp"
#include "moecore/kernels/share_rows.hpp"

namespace moecore::cpu {

void address_rows(const AddressRowsArgs& args) {
    for (int part = 0; part < args.num_parts; ++part) {
        const bool is_last = part + 1 == args.num_parts;
        const int64_t end = is_last ? args.num_rows : args.firsts[part + 1];
        for (int64_t i = args.firsts[part]; i < end; ++i)
            args.addresses[args.index != nullptr ? args.index[i] : i] =
                args.targets[part] + (i - args.firsts[part]) * args.row_bytes;
    }
}

void address_slots(const AddressSlotsArgs& args) {
    for (int64_t row = 0; row < args.num_slots; ++row) {
        const int64_t slot = args.slots[row];
        if (slot < 0 || slot >= args.num_slots) continue;
        args.addresses[row] =
            args.targets[slot / args.slots_per_rank] + slot % args.slots_per_rank * args.row_bytes;
    }
}

void share_rows(const ShareRowsArgs& args) {
    constexpr int64_t kBytesPerRange = 64 * 1024;
    const auto bytes = static_cast<size_t>(args.row_bytes);
    const int64_t grain = std::max<int64_t>(1, kBytesPerRange / args.row_bytes);
    parallel_ranges(args.padded_rows, grain, [&](int64_t begin, int64_t end) {
        for (int i = 0; i < args.num_targets; ++i)
            for (int64_t row = begin; row < end; ++row) {
                char* target = reinterpret_cast<char*>(args.targets[i] + row * args.row_bytes);
                if (row < args.num_rows)
                    std::memcpy(target,
                                static_cast<const char*>(args.source) + row * args.source_stride,
                                bytes);
                else
                    std::memset(target, 0xff, bytes);
            }
    });
}

}  // namespace moecore::cpu
