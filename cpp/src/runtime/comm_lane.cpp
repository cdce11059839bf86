#include "runtime/comm_lane.hpp"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

namespace moecore {
namespace {

class InlineLane : public CommLane {
public:
    int64_t submit(Work work, Stream compute) override {
        work(compute);
        return 0;
    }
    void wait(int64_t, Stream) override {}
};

/// After work has thrown, the rest of the queue is dropped, and every wait throws the same.
class ThreadLane : public CommLane {
public:
    ThreadLane() : thread_([this] { run(); }) {}

    ~ThreadLane() override {
        {
            const std::lock_guard lock(mutex_);
            is_closing_ = true;
        }
        changed_.notify_all();
        thread_.join();
    }

    int64_t submit(Work work, Stream) override {
        int64_t ticket = 0;
        {
            const std::lock_guard lock(mutex_);
            queue_.push_back(std::move(work));
            ticket = ++submitted_;
        }
        changed_.notify_all();
        return ticket;
    }

    void wait(int64_t ticket, Stream) override {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return done_ >= ticket; });
        if (error_ != nullptr) std::rethrow_exception(error_);
    }

private:
    void run() {
        std::unique_lock lock(mutex_);
        for (;;) {
            changed_.wait(lock, [&] { return is_closing_ || !queue_.empty(); });
            if (queue_.empty()) return;
            Work work = std::move(queue_.front());
            queue_.pop_front();
            if (error_ == nullptr) {
                lock.unlock();
                std::exception_ptr error;
                try {
                    work({});
                } catch (...) {
                    error = std::current_exception();
                }
                lock.lock();
                error_ = error;
            }
            ++done_;
            changed_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Work> queue_;
    int64_t submitted_ = 0, done_ = 0;
    std::exception_ptr error_;
    bool is_closing_ = false;
    std::thread thread_;
};

}  // namespace

std::unique_ptr<CommLane> make_inline_lane() { return std::make_unique<InlineLane>(); }
std::unique_ptr<CommLane> make_thread_lane() { return std::make_unique<ThreadLane>(); }

}  // namespace moecore
