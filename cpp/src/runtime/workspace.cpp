#include "moecore/workspace.hpp"

#include "moecore/error.hpp"

namespace moecore {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kBlockBytes = 2 << 20;  ///< of GPU memory that other processes open as a whole

/// On a GPU `bytes` rounded up to whole blocks: a transport lends them to another process, which
/// cannot open two allocations of one block.
size_t in_blocks(Device device, size_t bytes) {
    if (device.type == DeviceType::kCpu) return bytes;
    return (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
}

}  // namespace

Workspace::Workspace(Device device, size_t bytes) : buffer_(device, in_blocks(device, bytes)) {
    if (device.type == DeviceType::kCuda)
        counters_ = Buffer::zeros(device, static_cast<size_t>(kNumCounters) * sizeof(int32_t));
}

TensorView Workspace::counters() const {
    if (counters_.data() == nullptr) return {};
    return TensorView(counters_.data(), DType::kInt32, {kNumCounters}, device());
}

size_t Workspace::bytes_for(DType dtype, std::initializer_list<int64_t> shape) {
    size_t bytes = size_of(dtype);
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

TensorView Workspace::take(DType dtype, std::initializer_list<int64_t> shape) {
    const size_t bytes = bytes_for(dtype, shape);
    require(bytes <= size_bytes() - used_, "Workspace: size must be at least ", used_ + bytes,
            " bytes for this call, got ", size_bytes());
    void* data = static_cast<char*>(buffer_.data()) + used_;
    used_ += bytes;
    return TensorView(data, dtype, shape, device());
}

void Workspace::grow(size_t bytes) {
    if (bytes > size_bytes()) {
        const Device where = device();
        buffer_ = Buffer();  // free first, so that the peak is the new size alone
        buffer_ = Buffer(where, in_blocks(where, bytes));
    }
    reset();
}

}  // namespace moecore
