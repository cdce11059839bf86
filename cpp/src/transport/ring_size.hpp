#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>

namespace moecore {

/// Bytes of the ring of one ordered pair of ranks: as much as a core's caches hold, and no more
/// than 32 MiB for the group.
inline size_t default_ring_bytes(int size) {
    constexpr size_t kGroupBytes = size_t{32} << 20;
    const auto ranks = static_cast<size_t>(size);
    const size_t share = std::bit_floor(kGroupBytes / (ranks * ranks));
    return std::clamp<size_t>(share, size_t{4} << 10, size_t{256} << 10);
}

}  // namespace moecore
