#pragma once

#include <functional>
#include <memory>

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// Carries communication beside the computation, in the order of submission.
class CommLane {
public:
    using Work = std::function<void(Stream)>;

    virtual ~CommLane() = default;

    /// Runs `work` after all that was submitted before and all that `compute` holds by now. Returns
    /// a ticket for wait().
    virtual int64_t submit(Work work, Stream compute) = 0;

    /// On the CPU returns when the work is done; on CUDA makes `compute` wait for it. Throws what
    /// the work threw.
    virtual void wait(int64_t ticket, Stream compute) = 0;
};

/// Runs work at once, in the caller's thread.
std::unique_ptr<CommLane> make_inline_lane();

/// Beside the caller: a thread on the CPU, where transports block; a stream on CUDA.
std::unique_ptr<CommLane> make_side_lane(Device device);

}  // namespace moecore
