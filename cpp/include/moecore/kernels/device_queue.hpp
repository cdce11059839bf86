#pragma once

#include <cstddef>
#include <utility>

#include "moecore/stream.hpp"

namespace moecore::cuda {

/// GPUs of this process, 0 in a build without CUDA. Throws CudaError without a driver.
int device_count();

/// Copies between host and device in any direction, ordered on `stream` of the current device. Host
/// memory must be pinned for the copy to be asynchronous, and live until it is done.
void copy(void* target, const void* source, size_t bytes, Stream stream);

/// Sets every byte to `value`, ordered on `stream`.
void fill(void* target, unsigned char value, size_t bytes, Stream stream);

/// Host memory that the device can reach.
class PinnedBuffer {
public:
    PinnedBuffer() = default;
    ~PinnedBuffer();
    PinnedBuffer(const PinnedBuffer&) = delete;
    PinnedBuffer& operator=(const PinnedBuffer&) = delete;

    /// At least `bytes`; what it held is lost when it grows. Throws CudaError.
    void* reserve(size_t bytes);

private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

/// A stream of its own on GPU `device`.
class OwnedStream {
public:
    explicit OwnedStream(int device);
    ~OwnedStream();
    OwnedStream(const OwnedStream&) = delete;
    OwnedStream& operator=(const OwnedStream&) = delete;

    Stream get() const { return stream_; }

private:
    Stream stream_;
    int device_;
};

/// A point in a stream. `is_timed` ones can tell when they were reached. Move-only.
class Event {
public:
    explicit Event(int device, bool is_timed = false);
    ~Event();
    Event(Event&& other) noexcept
        : handle_(std::exchange(other.handle_, nullptr)), device_(other.device_) {}
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;

    void record(Stream stream);
    bool is_done() const;  ///< Throws CudaError if the device has failed.
    void* handle() const { return handle_; }

private:
    void* handle_ = nullptr;
    int device_;
};

/// Milliseconds from one timed event to another. REQUIRES: both are done.
double elapsed_ms(const Event& begin, const Event& end);

/// What `stream` is given from now on waits for the event's last record. `event`: Event::handle(),
/// also of another thread's.
void wait_for(Stream stream, void* event);

}  // namespace moecore::cuda
