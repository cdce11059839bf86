#include "runtime/timeline.hpp"

#include <cstdio>
#include <thread>

#include "moecore/error.hpp"
#include "moecore/kernels/memory.hpp"

namespace moecore {

void Timeline::start(Device device) {
    const std::lock_guard lock(mutex_);
    device_ = device;
    spans_.clear();
    events_.clear();
    start_event_.clear();
    start_ = Clock::now();
    is_on_ = true;
}

size_t Timeline::begin(const char* name, int group, Lane lane, Stream stream) {
    const std::lock_guard lock(mutex_);
    spans_.push_back({name, group, lane, now_us(), -1.0});
    if (device_.type == DeviceType::kCuda) {
        if (start_event_.empty()) {
            start_event_.emplace_back(device_.index, cuda::Event::Use::kTime);
            start_event_[0].record(stream);
        }
        events_.push_back({cuda::Event(device_.index, cuda::Event::Use::kTime),
                           cuda::Event(device_.index, cuda::Event::Use::kTime)});
        events_.back().begin.record(stream);
    }
    return spans_.size() - 1;
}

void Timeline::end(size_t index, Stream stream) {
    const std::lock_guard lock(mutex_);
    spans_[index].end_us = now_us();
    if (device_.type == DeviceType::kCuda) events_[index].end.record(stream);
}

std::vector<Timeline::Span> Timeline::spans() {
    const std::lock_guard lock(mutex_);
    std::vector<Span> result;
    for (size_t i = 0; i < spans_.size(); ++i) {
        Span span = spans_[i];
        if (span.end_us < 0) continue;  // it threw
        if (device_.type == DeviceType::kCuda) {
            while (!events_[i].end.is_done()) std::this_thread::yield();
            span.begin_us = 1e3 * cuda::elapsed_ms(start_event_[0], events_[i].begin);
            span.end_us = 1e3 * cuda::elapsed_ms(start_event_[0], events_[i].end);
        }
        result.push_back(span);
    }
    return result;
}

std::string Timeline::chrome_trace(int rank) {
    std::string json;
    for (const Span& span : spans()) {
        const bool is_communication = span.lane == Lane::kCommunication;
        const std::string group = span.group < 0 ? "" : concat(" ", span.group);
        char times[96];
        std::snprintf(times, sizeof times, "\"ts\":%.3f,\"dur\":%.3f", span.begin_us,
                      span.end_us - span.begin_us);
        json += concat(json.empty() ? "" : ",\n", "{\"ph\":\"X\",\"name\":\"", span.name, group,
                       "\",\"cat\":\"", is_communication ? "communication" : "compute",
                       "\",\"pid\":", rank, ",\"tid\":", is_communication ? 1 : 0, ",", times, "}");
    }
    return json;
}

}  // namespace moecore
