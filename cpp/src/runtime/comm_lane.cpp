#include "runtime/comm_lane.hpp"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "moecore/kernels/device_queue.hpp"
#include "moecore/kernels/memory.hpp"

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

/// A stream beside the caller's. Work is put on it at once; events keep the order.
class StreamLane : public CommLane {
public:
    explicit StreamLane(int device) : device_(device), stream_(device), ready_(device) {}

    int64_t submit(Work work, Stream compute) override {
        const cuda::DeviceScope scope(device_);
        ready_.record(compute);
        cuda::wait_for(stream_.get(), ready_.handle());
        work(stream_.get());
        // A wait on an event means its last record, so one for each piece of work in flight.
        const auto slot = static_cast<size_t>(submitted_) % kEvents;
        if (done_.size() <= slot) done_.emplace_back(device_);
        done_[slot].record(stream_.get());
        return submitted_++;
    }

    void wait(int64_t ticket, Stream compute) override {
        const cuda::DeviceScope scope(device_);
        cuda::wait_for(compute, done_[static_cast<size_t>(ticket) % kEvents].handle());
    }

private:
    static constexpr size_t kEvents = 256;  ///< more than one layer submits

    int device_;
    cuda::OwnedStream stream_;
    cuda::Event ready_;
    std::vector<cuda::Event> done_;
    int64_t submitted_ = 0;
};

}  // namespace

std::unique_ptr<CommLane> make_inline_lane() { return std::make_unique<InlineLane>(); }
std::unique_ptr<CommLane> make_side_lane(Device device) {
    if (device.type == DeviceType::kCuda) return std::make_unique<StreamLane>(device.index);
    return std::make_unique<ThreadLane>();
}

}  // namespace moecore
