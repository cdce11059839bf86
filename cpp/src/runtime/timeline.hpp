#pragma once

#include <chrono>
#include <mutex>
#include <string>
#include <vector>

#include "moecore/kernels/device_queue.hpp"
#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// When the phases of layers ran, on which lane. Off by default, and then free. Thread-safe.
class Timeline {
public:
    enum class Lane : uint8_t { kCompute, kCommunication };

    /// Forgets what was recorded and records from now on; `device` tells whose time counts.
    void start(Device device);
    void stop() { is_on_ = false; }

    /// Calls fn() and records it as `name` of `group` (-1 for none). On CUDA the times are those of
    /// what fn puts on `stream`.
    template <typename Fn>
    void span(const char* name, int group, Lane lane, Stream stream, Fn&& fn) {
        if (!is_on_) return fn();
        const size_t index = begin(name, group, lane, stream);
        fn();
        end(index, stream);
    }

    struct Span {
        const char* name;
        int group;
        Lane lane;
        double begin_us, end_us;  ///< since start()
    };
    /// Every finished span. On CUDA waits until the last one is.
    std::vector<Span> spans();

    /// The spans as Chrome's trace events, for chrome://tracing and ui.perfetto.dev.
    std::string chrome_trace(int rank);

private:
    using Clock = std::chrono::steady_clock;
    struct Events {
        cuda::Event begin, end;
    };

    size_t begin(const char* name, int group, Lane lane, Stream stream);
    void end(size_t index, Stream stream);
    double now_us() const {
        return std::chrono::duration<double, std::micro>(Clock::now() - start_).count();
    }

    bool is_on_ = false;
    Device device_;
    Clock::time_point start_;
    std::mutex mutex_;
    std::vector<Span> spans_;
    std::vector<Events> events_;            ///< of each span, on CUDA
    std::vector<cuda::Event> start_event_;  ///< one, on CUDA
};

}  // namespace moecore
