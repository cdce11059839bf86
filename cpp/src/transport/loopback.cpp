#include <atomic>
#include <cstring>
#include <mutex>

#include "moecore/error.hpp"
#include "moecore/transport.hpp"

namespace moecore {
namespace {

class LoopbackTransport : public Transport {
public:
    int rank() const override { return 0; }
    int size() const override { return 1; }
    const char* kind() const override { return "loopback"; }

    void all_gather(const char*, const void* mine, void* all, size_t bytes) override {
        throw_if_aborted();
        std::memcpy(all, mine, bytes);
    }

    void all_to_all_v(const char*, const RowsToSend& send, const RowsToReceive& recv,
                      size_t row_bytes, Stream) override {
        throw_if_aborted();
        const char* source = static_cast<const char*>(send.data);
        char* target = static_cast<char*>(recv.data);
        const auto count = static_cast<size_t>(send.counts[0]);
        if (send.index == nullptr && count > 0) std::memcpy(target, source, count * row_bytes);
        for (size_t row = 0; send.index != nullptr && row < count; ++row)
            std::memcpy(target + row * row_bytes,
                        source + static_cast<size_t>(send.index[row]) * send.row_stride, row_bytes);
    }

    void abort(const std::string& reason) noexcept override {
        const std::lock_guard lock(mutex_);
        if (!reason_.empty()) return;
        reason_ = reason.empty() ? "aborted" : reason;
    }

private:
    void throw_if_aborted() {
        const std::lock_guard lock(mutex_);
        if (!reason_.empty())
            throw TransportError(
                0, "", concat("rank 0 has failed: ", reason_, ". It needs a new transport."));
    }

    std::mutex mutex_;
    std::string reason_;
};

}  // namespace

std::unique_ptr<Transport> make_loopback_transport(Device device) {
    require(device.type == DeviceType::kCpu, "make_loopback_transport: device must be cpu, got ",
            to_string(device));
    return std::make_unique<LoopbackTransport>();
}

}  // namespace moecore
