#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "moecore/kernels/device_queue.hpp"

namespace moecore {

/// Streams that copy side by side: one copy engine does not fill the link between two GPUs.
class CopyLanes {
public:
    struct Copy {
        char* target;
        const char* source;
        size_t bytes;
    };

    explicit CopyLanes(int device) {
        for (int i = 0; i < kLanes; ++i) lanes_.push_back(std::make_unique<Lane>(device));
        fork_.emplace(device);
    }

    /// Makes `copies` after what `stream` holds, and before what it is given next.
    void run(const std::vector<Copy>& copies, Stream stream) {
        size_t total = 0;
        for (const Copy& copy : copies) total += copy.bytes;
        if (total < kFewBytes) {
            for (const Copy& copy : copies)
                cuda::copy(copy.target, copy.source, copy.bytes, stream);
            return;
        }
        fork_->record(stream);
        for (auto& lane : lanes_) cuda::wait_for(lane->stream.get(), fork_->handle());
        const size_t piece = std::max(kPieceBytes, total / (4 * lanes_.size()));
        size_t next = 0;
        for (const Copy& copy : copies)
            for (size_t at = 0; at < copy.bytes; at += piece)
                cuda::copy(copy.target + at, copy.source + at, std::min(piece, copy.bytes - at),
                           lanes_[next++ % lanes_.size()]->stream.get());
        for (auto& lane : lanes_) {
            lane->done.record(lane->stream.get());
            cuda::wait_for(stream, lane->done.handle());
        }
    }

private:
    static constexpr int kLanes = 4;
    static constexpr size_t kFewBytes = size_t{1} << 20, kPieceBytes = size_t{1} << 20;

    struct Lane {
        explicit Lane(int device) : stream(device), done(device) {}
        cuda::OwnedStream stream;
        cuda::Event done;
    };
    std::vector<std::unique_ptr<Lane>> lanes_;
    std::optional<cuda::Event> fork_;
};

}  // namespace moecore
