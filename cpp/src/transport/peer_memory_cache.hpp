#pragma once

#include <algorithm>
#include <deque>
#include <memory>

#include "moecore/kernels/peer_memory.hpp"

namespace moecore {

/// The latest allocations that one other process has lent, kept open: opening one takes far longer
/// than a copy. Its owner names memory anew after freeing it, so a name never goes stale.
class PeerMemoryCache {
public:
    /// Memory at `place` in that process.
    const char* find(const cuda::ExportedMemory& place) {
        auto open = std::find_if(open_.begin(), open_.end(), [&](const Open& one) {
            return one.allocation == place.allocation;
        });
        if (open == open_.end()) {
            if (open_.size() == kMost) {
                cuda::wait_for_device();  // a copy may still read the oldest
                open_.pop_front();
            }
            open_.push_back(
                {place.allocation, std::make_unique<cuda::PeerMemory>(place.allocation)});
            open = std::prev(open_.end());
        }
        return open->memory->data() + place.offset;
    }

private:
    static constexpr size_t kMost = 8;
    struct Open {
        cuda::IpcHandle allocation;
        std::unique_ptr<cuda::PeerMemory> memory;
    };
    std::deque<Open> open_;
};

}  // namespace moecore
