#pragma once

// One message through a ring: a frame that says which call it belongs to, then rows.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "transport/mailbox.hpp"

namespace moecore {

/// Precedes the bytes of a message, so that ranks out of step are noticed, not obeyed.
struct Frame {
    uint64_t call = 0;  ///< calls of this group so far
    uint64_t bytes = 0;
};

/// The writing end. A default-constructed one is done, and so is an Incoming.
class Outgoing {
public:
    Outgoing() = default;
    Outgoing(RingCell& cell, char* data, size_t capacity, Frame frame, const void* rows,
             const int32_t* index, size_t row_bytes, size_t row_stride)
        : cell_(&cell),
          data_(data),
          capacity_(capacity),
          frame_(frame),
          rows_(static_cast<const char*>(rows)),
          index_(index),
          row_bytes_(index == nullptr ? frame.bytes : row_bytes),
          row_stride_(row_stride),
          left_(frame.bytes),
          frame_sent_(false) {}

    bool is_done() const { return left_ == 0 && frame_sent_; }

    /// Writes what fits; false if nothing did.
    bool advance() {
        const uint64_t before = cell_->written.load(std::memory_order_relaxed);
        written_ = before;
        const uint64_t end = cell_->read.load(std::memory_order_acquire) + capacity_;
        if (!frame_sent_) {
            if (end - written_ < sizeof frame_) return false;
            write(reinterpret_cast<const char*>(&frame_), sizeof frame_);
            frame_sent_ = true;
        }
        while (left_ > 0 && written_ < end) {
            const size_t count = std::min<size_t>(row_bytes_ - offset_, end - written_);
            const auto row = static_cast<size_t>(index_ == nullptr ? 0 : index_[row_]);
            write(rows_ + row * row_stride_ + offset_, count);
            left_ -= count;
            offset_ += count;
            if (offset_ == row_bytes_) {
                offset_ = 0;
                ++row_;
            }
        }
        cell_->written.store(written_, std::memory_order_release);
        return written_ != before;
    }

private:
    void write(const char* source, size_t count) {
        const size_t at = written_ & (capacity_ - 1);
        const size_t first = std::min(count, capacity_ - at);
        std::memcpy(data_ + at, source, first);
        std::memcpy(data_, source + first, count - first);
        written_ += count;
    }

    RingCell* cell_ = nullptr;
    char* data_ = nullptr;
    size_t capacity_ = 0;  ///< a power of two
    Frame frame_;
    const char* rows_ = nullptr;
    const int32_t* index_ = nullptr;
    size_t row_bytes_ = 0, row_stride_ = 0;
    uint64_t left_ = 0;
    uint64_t written_ = 0;
    size_t row_ = 0, offset_ = 0;
    bool frame_sent_ = true;
};

/// The reading end.
class Incoming {
public:
    Incoming() = default;
    Incoming(RingCell& cell, const char* data, size_t capacity, Frame expected, void* target)
        : cell_(&cell),
          data_(data),
          capacity_(capacity),
          expected_(expected),
          target_(static_cast<char*>(target)),
          left_(expected.bytes),
          has_frame_(false) {}

    bool is_done() const { return left_ == 0 && has_frame_; }
    const Frame& expected() const { return expected_; }
    /// The frame that came; not the expected one if is_out_of_step().
    const Frame& arrived() const { return arrived_; }
    bool is_out_of_step() const {
        return has_frame_ && (arrived_.call != expected_.call || arrived_.bytes != expected_.bytes);
    }

    /// Reads what is there; false if nothing was.
    bool advance() {
        const uint64_t before = cell_->read.load(std::memory_order_relaxed);
        read_ = before;
        const uint64_t end = cell_->written.load(std::memory_order_acquire);
        if (!has_frame_) {
            if (end - read_ < sizeof arrived_) return false;
            read(reinterpret_cast<char*>(&arrived_), sizeof arrived_);
            has_frame_ = true;
            if (is_out_of_step()) return true;
        }
        const size_t count = std::min<uint64_t>(left_, end - read_);
        if (count > 0) read(target_, count);
        target_ += count;
        left_ -= count;
        cell_->read.store(read_, std::memory_order_release);
        return read_ != before;
    }

private:
    void read(char* target, size_t count) {
        const size_t at = read_ & (capacity_ - 1);
        const size_t first = std::min(count, capacity_ - at);
        std::memcpy(target, data_ + at, first);
        std::memcpy(target + first, data_, count - first);
        read_ += count;
    }

    RingCell* cell_ = nullptr;
    const char* data_ = nullptr;
    size_t capacity_ = 0;
    Frame expected_, arrived_;
    char* target_ = nullptr;
    uint64_t left_ = 0;
    uint64_t read_ = 0;
    bool has_frame_ = true;
};

}  // namespace moecore
