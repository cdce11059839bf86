#pragma once

#include <algorithm>
#include <deque>
#include <memory>

#include "moecore/kernels/peer_memory.hpp"

namespace moecore {

/// The latest allocations that one other process has lent, kept open: opening one takes far longer
/// than a copy. Its owner names memory anew after freeing it, so a name never goes stale.
template <typename Memory = cuda::PeerMemory>
class PeerMemoryCache {
public:
    /// Memory at `place` in that process. `wait` returns when nothing reads or writes memory opened
    /// before.
    template <typename Wait>
    char* find(const cuda::ExportedMemory& place, Wait&& wait) {
        auto open = std::find_if(open_.begin(), open_.end(), [&](const Open& one) {
            return one.place.allocation == place.allocation;
        });
        if (open == open_.end()) {
            // What lay in the same blocks is freed, and while it is open the driver opens nothing
            // else there.
            const auto is_in_the_way = [&](const Open& one) { return overlap(one.place, place); };
            const bool is_full = open_.size() == kMost;
            if (is_full || std::any_of(open_.begin(), open_.end(), is_in_the_way)) wait();
            std::erase_if(open_, is_in_the_way);
            if (open_.size() == kMost) open_.pop_front();
            open_.push_back({place, std::make_unique<Memory>(place.allocation)});
        } else {
            // The latest stay, so that several pieces of memory can be in use at a time.
            std::rotate(open, std::next(open), open_.end());
        }
        return open_.back().memory->data() + place.offset;
    }

private:
    static constexpr size_t kMost = 8;
    static constexpr uint64_t kBlockBytes = 2 << 20;  ///< a process opens whole blocks
    struct Open {
        cuda::ExportedMemory place;
        std::unique_ptr<Memory> memory;
    };

    /// Have `a` and `b` a block in common?
    static bool overlap(const cuda::ExportedMemory& a, const cuda::ExportedMemory& b) {
        const auto first = [](const auto& m) { return m.start / kBlockBytes; };
        const auto last = [](const auto& m) { return (m.start + m.bytes - 1) / kBlockBytes; };
        return first(a) <= last(b) && first(b) <= last(a);
    }

    std::deque<Open> open_;
};

}  // namespace moecore
