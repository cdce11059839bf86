#pragma once

#include <functional>
#include <memory>

#include "moecore/kernels/device_queue.hpp"
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

/// A second stream for GEMMs. Groups take turns on it and the caller's: while the last tiles of one
/// group run, those of the next fill the multiprocessors that have none.
class SecondStream {
public:
    explicit SecondStream(int device);
    Stream get() const { return stream_.get(); }
    /// It waits for all that `compute` holds by now.
    void follow(Stream compute);
    /// `compute` waits for all that it holds by now.
    void join(Stream compute);

private:
    int device_;
    cuda::OwnedStream stream_;
    cuda::Event event_;
};

/// Runs work at once, in the caller's thread.
std::unique_ptr<CommLane> make_inline_lane();

/// Beside the caller: a thread on the CPU, where transports block; a stream on CUDA.
std::unique_ptr<CommLane> make_side_lane(Device device);

}  // namespace moecore
