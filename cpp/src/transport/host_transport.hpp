#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "moecore/transport.hpp"
#include "transport/byte_ring.hpp"
#include "transport/mailbox.hpp"
#include "transport/process.hpp"

namespace moecore {

/// A rank over shared mailboxes: threads of one process (in_process), or processes (shm).
class HostTransport : public Transport {
public:
    /// `memory` owns what `boxes` describes.
    HostTransport(const char* kind, std::shared_ptr<void> memory, const Mailboxes& boxes, int rank,
                  bool is_one_process);
    ~HostTransport() override;

    int rank() const override { return rank_; }
    int size() const override { return boxes_.size(); }
    const char* kind() const override { return kind_; }
    void all_gather(const char* phase, const void* mine, void* all, size_t bytes) override;
    void all_to_all_v(const char* phase, const RowsToSend& send, const RowsToReceive& recv,
                      size_t row_bytes, Stream stream) override;
    /// Threads of a process reach each other's memory.
    bool can_lend() const override { return is_one_process_; }
    bool loans_last() const override { return is_one_process_; }
    Loans lend(const char* phase, std::span<const LentMemory> mine, std::span<const int64_t> notes,
               Stream stream) override;
    void finish_writes(const char* phase, Stream) override { barrier(phase); }
    void check(const char* phase) override;
    void blame(const char* phase) override;
    void note(const char* phase) override;
    void abort(const std::string& reason) noexcept override;

private:
    using Clock = std::chrono::steady_clock;

    void pass_on(const TransportError& error) override;
    void begin_call(const char* phase);
    /// Advances every message until all are done.
    void exchange(const char* phase);
    /// One round over the peers: whether a byte moved. `is_done` says whether nothing is left.
    bool advance_all(const char* phase, bool& is_done);
    void throw_if_aborted() const;
    /// Throws if a peer that this rank waits for can no longer come, or `since` is too long ago.
    void check_peers(const char* phase, Clock::time_point since);
    /// The error of a peer that is alive, but has not come by the deadline.
    [[noreturn]] void fail_late(int peer, const char* phase, bool is_stopped);
    [[noreturn]] void fail(int culprit, const char* phase, const std::string& message);
    std::string describe(int peer) const;
    bool waits_for(int peer) const;

    const char* kind_;
    std::shared_ptr<void> memory_;
    Mailboxes boxes_;
    int rank_;
    bool is_one_process_;
    int spins_;
    uint64_t call_ = 0;
    std::vector<Outgoing> out_;
    std::vector<Incoming> in_;
};

/// Sets the group's abort cell, unless it is set, and wakes every rank.
void post_abort(const Mailboxes& boxes, int culprit, const char* phase, const std::string& message);

/// The process of a rank that has connected.
ProcessId process_of(const RankCell& cell);

/// Wakes whoever sleeps on the cell's doorbell.
void ring_doorbell(RankCell& cell);

/// Sleeps until cell.doorbell is no longer `seen`, or about `milliseconds`.
void sleep_on_doorbell(RankCell& cell, uint32_t seen, int milliseconds);

}  // namespace moecore
