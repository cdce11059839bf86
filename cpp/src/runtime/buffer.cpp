#include "moecore/buffer.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "moecore/kernels/memory.hpp"

namespace moecore {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kAlignment = 256;

void* allocate_cpu(size_t bytes) {
    const bool is_large = bytes >= kHugePage;
    const size_t alignment = is_large ? kHugePage : kAlignment;
    void* data = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (data == nullptr) throw std::bad_alloc();
    // Advice only: a kernel without transparent huge pages refuses, and 4 KiB pages serve.
    if (is_large) madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
    return data;
}

}  // namespace

Buffer::Buffer(Device device, size_t bytes) : bytes_(bytes), device_(device) {
    if (bytes == 0) return;
    data_ = device.type == DeviceType::kCuda ? cuda::allocate(device.index, bytes)
                                             : allocate_cpu(bytes);
}

Buffer Buffer::zeros(Device device, size_t bytes) {
    if (device.type == DeviceType::kCpu) {
        Buffer buffer(device, bytes);
        std::memset(buffer.data_, 0, bytes);
        return buffer;
    }
    Buffer buffer;
    buffer.device_ = device;
    buffer.data_ = cuda::allocate_zeros(device.index, bytes);
    buffer.bytes_ = bytes;
    return buffer;
}

Buffer::~Buffer() {
    if (data_ == nullptr) return;
    if (device_.type == DeviceType::kCuda)
        cuda::deallocate(data_, device_.index);
    else
        std::free(data_);
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      device_(other.device_) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(device_, other.device_);
    return *this;
}

}  // namespace moecore
