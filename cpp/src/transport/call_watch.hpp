#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace moecore {

/// Watches a thread's calls into a library that may wait for ever: if one lasts longer than its
/// limit, `expired` is called once, from a thread of this object's own, and must make the call
/// return. Watching costs the caller two stores a call.
class CallWatch {
public:
    explicit CallWatch(std::function<void()> expired)
        : expired_(std::move(expired)), thread_([this] { run(); }) {}

    ~CallWatch() {
        {
            const std::lock_guard lock(mutex_);
            is_closing_ = true;
        }
        changed_.notify_all();
        thread_.join();
    }
    CallWatch(const CallWatch&) = delete;
    CallWatch& operator=(const CallWatch&) = delete;

    /// What fn() returns. One call at a time.
    template <typename Fn>
    auto run(double limit_s, Fn&& fn) {
        struct Scope {
            std::atomic<Clock::rep>& end;
            ~Scope() { end = 0; }
        } scope{end_};
        const auto limit = std::chrono::duration<double>(limit_s);
        end_ = (Clock::now() + std::chrono::duration_cast<Clock::duration>(limit))
                   .time_since_epoch()
                   .count();
        return fn();
    }

private:
    using Clock = std::chrono::steady_clock;

    void run() {
        constexpr auto kPeriod = std::chrono::milliseconds(50);
        std::unique_lock lock(mutex_);
        while (!changed_.wait_for(lock, kPeriod, [&] { return is_closing_; })) {
            const Clock::rep end = end_;
            if (end == 0 || Clock::now().time_since_epoch().count() < end) continue;
            lock.unlock();
            return expired_();
        }
    }

    std::function<void()> expired_;
    std::atomic<Clock::rep> end_{0};  ///< when the current call must be over; 0 without a call
    std::mutex mutex_;
    std::condition_variable changed_;
    bool is_closing_ = false;
    std::thread thread_;
};

}  // namespace moecore
