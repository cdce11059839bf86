#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <vector>

#include "moecore/buffer.hpp"
#include "moecore/kernels/device_queue.hpp"
#include "moecore/kernels/peer_memory.hpp"
#include "moecore/kernels/signals.hpp"

namespace moecore {

/// Where the ranks of a host meet on their GPUs. REQUIRES: each is a process, and has its own GPU.
class GpuMeeting {
public:
    GpuMeeting(int device, int rank, int num_ranks)
        : words_(Buffer::zeros({DeviceType::kCuda, device}, kBlockBytes)) {
        args_.words = static_cast<uint32_t*>(words_.data());
        args_.rank = rank;
        args_.num_ranks = num_ranks;
        args_.state = static_cast<MeetingState*>(pinned_.reserve(sizeof(MeetingState)));
        std::memset(args_.state, 0, sizeof(MeetingState));
    }

    /// What the other ranks need to reach this one.
    cuda::ExportedMemory words() const { return cuda::export_memory(args_.words); }

    /// To be called once, with the words of every rank.
    void connect(const std::vector<cuda::ExportedMemory>& everyones) {
        for (size_t r = 0; r < everyones.size(); ++r) {
            args_.theirs[r] = args_.words;
            if (r == static_cast<size_t>(args_.rank)) continue;
            const cuda::PeerMemory& memory = opened_.emplace_back(everyones[r].allocation);
            args_.theirs[r] = reinterpret_cast<uint32_t*>(memory.data() + everyones[r].offset);
        }
    }

    /// What `stream` gets next sees all that every rank has written before its own call of this.
    /// The wait ends after `limit` seconds.
    void meet(double limit, Stream stream) {
        constexpr double kLongest = 1e9;  // seconds; more would not fit
        args_.limit_ns = static_cast<uint64_t>(std::min(limit, kLongest) * 1e9);
        cuda::meet(args_, stream);
    }

    /// Nobody waits any more: lets streams run on after a failure.
    void end() noexcept {
        std::atomic_ref(args_.state->is_over).store(1, std::memory_order_release);
    }

    /// Whether nobody waits any more: what streams did since is worth nothing.
    bool has_ended() const {
        return std::atomic_ref(args_.state->is_over).load(std::memory_order_acquire) != 0;
    }

    /// The rank that did not come in time, or -1.
    int late_rank() const {
        return std::atomic_ref(args_.state->late).load(std::memory_order_acquire) - 1;
    }

private:
    static constexpr size_t kBlockBytes = 2 << 20;  ///< other processes open whole blocks

    cuda::PinnedBuffer pinned_;
    std::deque<cuda::PeerMemory> opened_;
    Buffer words_;  ///< freed first, when the GPU no longer uses the others
    SignalArgs args_{};
};

}  // namespace moecore
