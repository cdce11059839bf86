#include <atomic>
#include <cstring>
#include <mutex>

#include "moecore/error.hpp"
#include "moecore/transport.hpp"
#include "transport/stream_wait.hpp"

namespace moecore {
namespace {

class LoopbackTransport : public Transport {
public:
    explicit LoopbackTransport(Device device) : device_(device) {}

    Device device() const override { return device_; }
    int rank() const override { return 0; }
    int size() const override { return 1; }
    const char* kind() const override { return "loopback"; }

    void all_gather(const char*, const void* mine, void* all, size_t bytes) override {
        throw_if_aborted();
        std::memcpy(all, mine, bytes);
    }

    void all_to_all_v(const char*, const RowsToSend& send, const RowsToReceive& recv,
                      size_t row_bytes, Stream stream) override {
        throw_if_aborted();
        const char* source = static_cast<const char*>(send.data);
        char* target = static_cast<char*>(recv.data);
        const auto count = static_cast<size_t>(send.counts[0]);
        if (send.index == nullptr) copy(target, source, count * row_bytes, stream);
        for (size_t row = 0; send.index != nullptr && row < count; ++row)
            std::memcpy(target + row * row_bytes,
                        source + static_cast<size_t>(send.index[row]) * send.row_stride, row_bytes);
    }

    void all_gather_rows(const char*, const void* mine, void* all, size_t bytes,
                         Stream stream) override {
        throw_if_aborted();
        copy(all, mine, bytes, stream);
    }

    void synchronize(const char* phase, Stream stream) override {
        if (device_.type == DeviceType::kCuda)
            wait_for_stream(*this, device_, phase, stream, [&] { throw_if_aborted(); });
    }

    void abort(const std::string& reason) noexcept override {
        const std::lock_guard lock(mutex_);
        if (!reason_.empty()) return;
        reason_ = reason.empty() ? "aborted" : reason;
    }

private:
    void copy(void* target, const void* source, size_t bytes, Stream stream) const {
        if (device_.type == DeviceType::kCuda)
            cuda::copy(target, source, bytes, stream);
        else if (bytes > 0)
            std::memcpy(target, source, bytes);
    }

    void throw_if_aborted() {
        const std::lock_guard lock(mutex_);
        if (!reason_.empty())
            throw TransportError(
                0, "", concat("rank 0 has failed: ", reason_, ". It needs a new transport."));
    }

    Device device_;
    std::mutex mutex_;
    std::string reason_;
};

}  // namespace

std::unique_ptr<Transport> make_loopback_transport(Device device) {
    return std::make_unique<LoopbackTransport>(device);
}

}  // namespace moecore
