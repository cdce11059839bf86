#pragma once

#include <cstddef>
#include <cstdint>
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

/// A point in a stream. Move-only.
class Event {
public:
    enum class Use : uint8_t {
        kOrder,
        kTime,   ///< can tell when it was reached
        kShare,  ///< other processes can wait for it, too
    };
    explicit Event(int device, Use use = Use::kOrder);
    /// Takes over a cudaEvent_t of `device`.
    static Event adopt(void* handle, int device);
    ~Event();
    Event(Event&& other) noexcept
        : handle_(std::exchange(other.handle_, nullptr)), device_(other.device_) {}
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;

    void record(Stream stream);
    bool is_done() const;  ///< Throws CudaError if the device has failed.
    void* handle() const { return handle_; }

private:
    Event() = default;

    void* handle_ = nullptr;
    int device_ = 0;
};

/// Milliseconds from one timed event to another. REQUIRES: both are done.
double elapsed_ms(const Event& begin, const Event& end);

/// What `stream` is given from now on waits for the event's last record. `event`: Event::handle(),
/// also of another thread's.
void wait_for(Stream stream, void* event);

}  // namespace moecore::cuda
