#pragma once

// Transports that change what communication costs, to measure what a schedule hides.

#include <deque>
#include <memory>
#include <string_view>
#include <vector>

#include "moecore/buffer.hpp"
#include "moecore/transport.hpp"

namespace moecore::bench {

/// Emulation of a link, not a measurement of one: every all_to_all_v takes at least `us` plus its
/// remote bytes over `gbps`, while the processor is free. CPU only.
std::unique_ptr<Transport> make_paced_transport(std::unique_ptr<Transport> inner, double gbps,
                                                double us);

/// The same plan without communication: records what all_gather gives while `is_recording`, then
/// gives it again, and moves no row (those of the recorded call are still in place). What is
/// written to other ranks' memory goes to memory of this one.
class EchoTransport : public Transport {
public:
    explicit EchoTransport(Transport& inner) : inner_(inner) {}

    void set_recording(bool is_recording) {
        is_recording_ = is_recording;
        if (is_recording) {
            recorded_.clear();
            loans_.clear();
        }
        next_ = next_loan_ = 0;
    }

    int rank() const override { return inner_.rank(); }
    int size() const override { return inner_.size(); }
    const char* kind() const override { return inner_.kind(); }
    Device device() const override { return inner_.device(); }
    void all_gather(const char* phase, const void* mine, void* all, size_t bytes) override;
    void all_to_all_v(const char* phase, const RowsToSend& send, const RowsToReceive& recv,
                      size_t row_bytes, Stream stream) override {
        if (is_recording_) inner_.all_to_all_v(phase, send, recv, row_bytes, stream);
    }
    void all_gather_rows(const char* phase, const void* mine, void* all, size_t bytes,
                         Stream stream) override {
        // Routes make the plan: they travel, though they are a thousandth of the rows.
        if (is_recording_ || std::string_view(phase) == "exchange routes")
            inner_.all_gather_rows(phase, mine, all, bytes, stream);
    }
    bool can_lend() const override { return inner_.can_lend(); }
    Loans lend(const char* phase, std::span<const LentMemory> mine, std::span<const int64_t> notes,
               Stream stream) override;
    void finish_writes(const char* phase, Stream stream) override {
        if (is_recording_) inner_.finish_writes(phase, stream);
    }
    void synchronize(const char* phase, Stream stream) override {
        inner_.synchronize(phase, stream);
    }
    void abort(const std::string& reason) noexcept override { inner_.abort(reason); }

private:
    void pass_on(const TransportError& error) override { inner_.abort_because(error); }
    Transport& inner_;
    bool is_recording_ = true;
    std::vector<std::vector<char>> recorded_;
    std::vector<Loans> loans_;
    std::deque<Buffer> sinks_;  ///< instead of what other ranks have lent
    size_t next_ = 0, next_loan_ = 0;
};

}  // namespace moecore::bench
