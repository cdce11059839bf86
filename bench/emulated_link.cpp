#include "emulated_link.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "harness.hpp"
#include "moecore/error.hpp"
#include "moecore/kernels/device_queue.hpp"

namespace moecore::bench {
namespace {

int64_t total(std::span<const int64_t> counts) {
    int64_t rows = 0;
    for (const int64_t count : counts) rows += count;
    return rows;
}

}  // namespace

void EmulatedLink::begin(Mode mode) {
    mode_ = mode;
    next_answer_ = next_arrival_ = 0;
    if (mode != Mode::kRecord) return;
    answers_.clear();
    arrived_.clear();
}

void EmulatedLink::all_gather(const char* phase, const void* mine, void* all, size_t bytes) {
    if (mode_ == Mode::kRecord) {
        inner_.all_gather(phase, mine, all, bytes);
        const char* begin = static_cast<const char*>(all);
        answers_.emplace_back(begin, begin + bytes * static_cast<size_t>(size()));
        return;
    }
    const std::vector<char>& answer = answers_.at(next_answer_++);
    require(answer.size() == bytes * static_cast<size_t>(size()),
            "EmulatedLink: a layer must make the calls of the recorded one, got other bytes in ",
            phase);
    std::memcpy(all, answer.data(), answer.size());
}

void EmulatedLink::all_to_all_v(const char* phase, const RowsToSend& send,
                                const RowsToReceive& recv, size_t row_bytes, Stream stream) {
    if (mode_ == Mode::kRecord) {
        inner_.all_to_all_v(phase, send, recv, row_bytes, stream);
        return remember(recv.data, static_cast<size_t>(total(recv.counts)) * row_bytes, stream);
    }
    const auto me = static_cast<size_t>(rank());
    const int64_t rows =
        std::max(total(send.counts) - send.counts[me], total(recv.counts) - recv.counts[me]);
    arrive(recv.data, static_cast<double>(rows) * static_cast<double>(row_bytes), stream);
}

void EmulatedLink::all_gather_rows(const char* phase, const void* mine, void* all, size_t bytes,
                                   Stream stream) {
    if (mode_ == Mode::kRecord) {
        inner_.all_gather_rows(phase, mine, all, bytes, stream);
        return remember(all, bytes * static_cast<size_t>(size()), stream);
    }
    arrive(all, static_cast<double>(bytes) * (size() - 1), stream);
}

void EmulatedLink::remember(const void* rows, size_t bytes, Stream stream) {
    const Buffer& copy = arrived_.emplace_back(device(), bytes);
    if (device().type == DeviceType::kCuda)
        cuda::copy(copy.data(), rows, bytes, stream);
    else if (bytes > 0)
        std::memcpy(copy.data(), rows, bytes);
}

void EmulatedLink::arrive(void* target, double remote_bytes, Stream stream) {
    const Buffer& rows = arrived_.at(next_arrival_++);
    if (mode_ == Mode::kEcho) return;
    const double us = link_.us + remote_bytes / (link_.gbps * 1e3);
    if (device().type == DeviceType::kCuda)
        return paced_copy(target, rows.data(), rows.size_bytes(), us, link_.blocks, stream);
    const double due = now_us() + us;
    std::memcpy(target, rows.data(), rows.size_bytes());
    const double left = due - now_us();
    if (left > 0) std::this_thread::sleep_for(std::chrono::duration<double, std::micro>(left));
}

}  // namespace moecore::bench
