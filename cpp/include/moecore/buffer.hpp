#pragma once

#include <cstddef>

#include "moecore/tensor_view.hpp"

namespace moecore {

/// Owned memory of one device, aligned to at least 256 bytes. Move-only.
///
/// On the CPU, buffers of 2 MiB and more come from the kernel in 2 MiB alignment and ask for
/// transparent huge pages (MADV_HUGEPAGE); where the kernel declines, ordinary pages serve.
class Buffer {
public:
    Buffer() = default;
    /// Throws std::bad_alloc (CPU), CudaError (CUDA), or UnsupportedError in a build without CUDA.
    Buffer(Device device, size_t bytes);
    /// Of zeros. A CUDA buffer is ready for any stream.
    static Buffer zeros(Device device, size_t bytes);
    ~Buffer();
    Buffer(Buffer&& other) noexcept;
    Buffer& operator=(Buffer&& other) noexcept;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    void* data() const { return data_; }
    size_t size_bytes() const { return bytes_; }
    Device device() const { return device_; }

private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
    Device device_;
};

}  // namespace moecore
