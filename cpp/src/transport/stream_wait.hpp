#pragma once

#include <chrono>
#include <thread>

#include "moecore/error.hpp"
#include "moecore/kernels/device_queue.hpp"
#include "moecore/kernels/memory.hpp"
#include "moecore/transport.hpp"

namespace moecore {

/// Waits until `stream` has done all it holds by now, at most transport.deadline() seconds. Calls
/// check() now and then, which may throw. Throws TransportError that blames nobody.
template <typename Check>
void wait_for_stream(Transport& transport, Device device, const char* phase, Stream stream,
                     Check&& check) {
    using Clock = std::chrono::steady_clock;
    constexpr auto kSpin = std::chrono::milliseconds(1);
    const cuda::DeviceScope scope(device.index);
    cuda::Event reached(device.index);
    reached.record(stream);
    const Clock::time_point start = Clock::now();
    while (!reached.is_done()) {
        const auto waited = Clock::now() - start;
        if (waited < kSpin) continue;  // a sleep would cost more than the wait usually takes
        check();
        if (std::chrono::duration<double>(waited).count() > transport.deadline())
            throw TransportError(
                -1, phase,
                concat("rank ", transport.rank(), " waited in phase '", phase,
                       "' for its GPU beyond the deadline of ", transport.deadline(),
                       " s: a peer has not sent its part, or the GPU is busy. Look for the rank "
                       "that stopped; every rank needs a new transport."));
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
}

}  // namespace moecore
