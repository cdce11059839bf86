#include "ep_transports.hpp"

#include <chrono>
#include <cstring>
#include <thread>

#include "harness.hpp"
#include "moecore/error.hpp"

namespace moecore::bench {
namespace {

class PacedTransport : public Transport {
public:
    PacedTransport(std::unique_ptr<Transport> inner, double gbps, double us)
        : inner_(std::move(inner)), gbps_(gbps), us_(us) {
        require(inner_->device().type == DeviceType::kCpu, "an emulated link must be on the CPU");
    }

    int rank() const override { return inner_->rank(); }
    int size() const override { return inner_->size(); }
    const char* kind() const override { return "emulated link"; }
    void all_gather(const char* phase, const void* mine, void* all, size_t bytes) override {
        inner_->all_gather(phase, mine, all, bytes);
    }
    void all_to_all_v(const char* phase, const RowsToSend& send, const RowsToReceive& recv,
                      size_t row_bytes, Stream stream) override {
        const double start = now_us();
        inner_->all_to_all_v(phase, send, recv, row_bytes, stream);
        const double bytes =
            std::max(remote(send.counts), remote(recv.counts)) * static_cast<double>(row_bytes);
        const double left = start + us_ + bytes / (gbps_ * 1e3) - now_us();
        if (left > 0) std::this_thread::sleep_for(std::chrono::duration<double, std::micro>(left));
    }
    void abort(const std::string& reason) noexcept override { inner_->abort(reason); }

private:
    void pass_on(const TransportError& error) override { inner_->abort_because(error); }
    double remote(std::span<const int64_t> counts) const {
        int64_t rows = 0;
        for (size_t r = 0; r < counts.size(); ++r)
            if (static_cast<int>(r) != rank()) rows += counts[r];
        return static_cast<double>(rows);
    }

    std::unique_ptr<Transport> inner_;
    double gbps_, us_;
};

}  // namespace

std::unique_ptr<Transport> make_paced_transport(std::unique_ptr<Transport> inner, double gbps,
                                                double us) {
    return std::make_unique<PacedTransport>(std::move(inner), gbps, us);
}

void EchoTransport::all_gather(const char* phase, const void* mine, void* all, size_t bytes) {
    if (is_recording_) {
        inner_.all_gather(phase, mine, all, bytes);
        const char* begin = static_cast<const char*>(all);
        recorded_.emplace_back(begin, begin + bytes * static_cast<size_t>(size()));
        return;
    }
    const std::vector<char>& answer = recorded_[next_++ % recorded_.size()];
    std::memcpy(all, answer.data(), answer.size());
}

Loans EchoTransport::lend(const char* phase, std::span<const LentMemory> mine,
                          std::span<const int64_t> notes, Stream stream) {
    if (!is_recording_) return loans_[next_loan_++ % loans_.size()];
    const Loans real = inner_.lend(phase, mine, notes, stream);
    Loans& echo = loans_.emplace_back(real);
    for (size_t i = 0; i < echo.memory.size(); ++i) {
        if (i / mine.size() == static_cast<size_t>(rank())) continue;
        sinks_.emplace_back(device(), echo.memory[i].bytes);
        echo.memory[i].data = sinks_.back().data();
    }
    return real;
}

}  // namespace moecore::bench
