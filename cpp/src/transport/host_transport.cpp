#include "transport/host_transport.hpp"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <ctime>
#include <thread>

#include "moecore/error.hpp"

namespace moecore {
namespace {

// A wait first spins on the doorbell: about 100 us where every rank can have a core, since a sleep
// and its end cost 70 us on a virtual machine; hardly at all where a spinning rank keeps another
// from running. Then it yields, then sleeps.
constexpr int kSpins = 2000;
constexpr int kSpinsOnSharedCores = 50;
constexpr int kYields = 16;
constexpr int kSleepMs = 20;  ///< the longest sleep: dead peers ring no bell
constexpr const char* kRemedy =
    " Every rank needs a new transport; see the log of the rank at fault for the cause.";

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

long futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* timeout) {
    return syscall(SYS_futex, word, operation, value, timeout, nullptr, 0);
}

std::string seconds(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g s", value);
    return text;
}

}  // namespace

ProcessId process_of(const RankCell& cell) {
    return {cell.process.load(), cell.process_start.load(), cell.process_namespace.load()};
}

void ring_doorbell(RankCell& cell) {
    cell.doorbell.fetch_add(1);
    // Either this load sees the sleeper, or the sleeper's futex call sees the new doorbell.
    if (cell.is_asleep.load() != 0) futex(&cell.doorbell, FUTEX_WAKE, INT32_MAX, nullptr);
}

void sleep_on_doorbell(RankCell& cell, uint32_t seen, int milliseconds) {
    const timespec timeout{0, milliseconds * 1'000'000L};
    cell.is_asleep.store(1);
    futex(&cell.doorbell, FUTEX_WAIT, seen, &timeout);
    cell.is_asleep.store(0);
}

void post_abort(const Mailboxes& boxes, int culprit, const char* phase,
                const std::string& message) {
    GroupCell& group = boxes.group();
    uint32_t none = 0;
    if (group.abort_state.compare_exchange_strong(none, 1)) {
        group.abort_rank.store(culprit, std::memory_order_relaxed);
        group.abort_phase.store(phase);
        group.abort_message.store(message.c_str());
        group.abort_state.store(2, std::memory_order_release);
    }
    for (int r = 0; r < boxes.size(); ++r) ring_doorbell(boxes.rank(r));
}

HostTransport::HostTransport(const char* kind, std::shared_ptr<void> memory, const Mailboxes& boxes,
                             int rank, bool is_one_process)
    : kind_(kind),
      memory_(std::move(memory)),
      boxes_(boxes),
      rank_(rank),
      is_one_process_(is_one_process),
      spins_(std::thread::hardware_concurrency() >= static_cast<unsigned>(boxes.size())
                 ? kSpins
                 : kSpinsOnSharedCores),
      out_(static_cast<size_t>(boxes.size())),
      in_(static_cast<size_t>(boxes.size())) {}

HostTransport::~HostTransport() {
    boxes_.rank(rank_).has_closed.store(1, std::memory_order_release);
    for (int r = 0; r < size(); ++r)
        if (r != rank_) ring_doorbell(boxes_.rank(r));
}

void HostTransport::all_gather(const char* phase, const void* mine, void* all, size_t bytes) {
    begin_call(phase);
    char* target = static_cast<char*>(all);
    std::memcpy(target + static_cast<size_t>(rank_) * bytes, mine, bytes);
    const Frame frame{call_, bytes};
    for (int r = 0; r < size(); ++r) {
        if (r == rank_) continue;
        const auto i = static_cast<size_t>(r);
        out_[i] = Outgoing(boxes_.ring(rank_, r), boxes_.ring_data(rank_, r), boxes_.ring_bytes(),
                           frame, mine, nullptr, 0, 0);
        in_[i] = Incoming(boxes_.ring(r, rank_), boxes_.ring_data(r, rank_), boxes_.ring_bytes(),
                          frame, target + i * bytes);
    }
    exchange(phase);
}

void HostTransport::all_to_all_v(const char* phase, const RowsToSend& send,
                                 const RowsToReceive& recv, size_t row_bytes, Stream) {
    begin_call(phase);
    const char* source = static_cast<const char*>(send.data);
    const int32_t* index = send.index;
    char* target = static_cast<char*>(recv.data);
    for (size_t i = 0; i < out_.size(); ++i) {
        const int r = static_cast<int>(i);
        const uint64_t out_bytes = static_cast<uint64_t>(send.counts[i]) * row_bytes;
        const uint64_t in_bytes = static_cast<uint64_t>(recv.counts[i]) * row_bytes;
        if (r == rank_) {
            for (int64_t row = 0; index != nullptr && row < send.counts[i]; ++row)
                std::memcpy(target + static_cast<size_t>(row) * row_bytes,
                            source + static_cast<size_t>(index[row]) * send.row_stride, row_bytes);
            if (index == nullptr && out_bytes > 0) std::memcpy(target, source, out_bytes);
        } else {
            // Nothing is sent where both sides know that there is nothing.
            if (out_bytes > 0)
                out_[i] =
                    Outgoing(boxes_.ring(rank_, r), boxes_.ring_data(rank_, r), boxes_.ring_bytes(),
                             {call_, out_bytes}, source, index, row_bytes, send.row_stride);
            if (in_bytes > 0)
                in_[i] = Incoming(boxes_.ring(r, rank_), boxes_.ring_data(r, rank_),
                                  boxes_.ring_bytes(), {call_, in_bytes}, target);
        }
        if (index != nullptr)
            index += send.counts[i];
        else
            source += out_bytes;
        target += in_bytes;
    }
    exchange(phase);
}

Loans HostTransport::lend(const char* phase, std::span<const LentMemory> mine,
                          std::span<const int64_t> notes, Stream stream) {
    if (!is_one_process_) return Transport::lend(phase, mine, notes, stream);
    const size_t memory_bytes = mine.size_bytes(), bytes = memory_bytes + notes.size_bytes();
    std::vector<char> own(bytes), all(bytes * static_cast<size_t>(size()));
    std::memcpy(own.data(), mine.data(), memory_bytes);
    if (!notes.empty()) std::memcpy(own.data() + memory_bytes, notes.data(), notes.size_bytes());
    all_gather(phase, own.data(), all.data(), bytes);
    Loans loans;
    const auto ranks = static_cast<size_t>(size());
    loans.memory.resize(ranks * mine.size());
    loans.notes.resize(ranks * notes.size());
    for (size_t r = 0; r < ranks; ++r) {
        const char* one = all.data() + r * bytes;
        std::memcpy(loans.memory.data() + r * mine.size(), one, memory_bytes);
        if (!notes.empty())
            std::memcpy(loans.notes.data() + r * notes.size(), one + memory_bytes,
                        notes.size_bytes());
    }
    return loans;
}

void HostTransport::begin_call(const char* phase) {
    boxes_.rank(rank_).phase.store(phase);
    throw_if_aborted();
    ++call_;
}

bool HostTransport::advance_all(const char* phase, bool& is_done) {
    bool has_moved = false;
    is_done = true;
    for (int step = 1; step < size(); ++step) {
        // Ranks begin with different peers, so that not all of them write to one.
        const int peer = (rank_ + step) % size();
        Outgoing& out = out_[static_cast<size_t>(peer)];
        Incoming& in = in_[static_cast<size_t>(peer)];
        bool touched = !out.is_done() && out.advance();
        if (!in.is_done() && in.advance()) {
            touched = true;
            if (in.is_out_of_step())
                fail(peer, phase,
                     concat("rank ", peer, " is out of step in phase '", phase, "': it sent ",
                            in.arrived().bytes, " bytes in its call ", in.arrived().call,
                            ", expected ", in.expected().bytes, " bytes in call ",
                            in.expected().call,
                            ". All ranks must run the same model, sizes and layers in the same "
                            "order."));
        }
        if (touched) {
            has_moved = true;
            ring_doorbell(boxes_.rank(peer));
        }
        is_done = is_done && out.is_done() && in.is_done();
    }
    return has_moved;
}

void HostTransport::exchange(const char* phase) {
    RankCell& cell = boxes_.rank(rank_);
    Clock::time_point last_progress = Clock::now();
    int idle = 0;
    for (;;) {
        const uint32_t seen = cell.doorbell.load(std::memory_order_acquire);
        bool is_done = false;
        const bool has_moved = advance_all(phase, is_done);
        if (is_done) return;
        throw_if_aborted();
        if (has_moved) {
            last_progress = Clock::now();
            idle = 0;
            continue;
        }
        const int spins = idle == 0 ? spins_ : 0;
        for (int i = 0; i < spins && cell.doorbell.load(std::memory_order_acquire) == seen; ++i)
            pause_briefly();
        if (cell.doorbell.load(std::memory_order_acquire) != seen) continue;
        if (++idle <= kYields) {
            sched_yield();
        } else {
            sleep_on_doorbell(cell, seen, kSleepMs);
            check_peers(phase, last_progress);
        }
    }
}

void HostTransport::throw_if_aborted() const {
    GroupCell& group = boxes_.group();
    if (group.abort_state.load(std::memory_order_acquire) == 0) return;
    // Whoever writes the reason is between two stores; it may also have died there.
    for (int i = 0; i < 1000 && group.abort_state.load(std::memory_order_acquire) != 2; ++i)
        sched_yield();
    throw TransportError(group.abort_rank.load(), group.abort_phase.load<std::string>(),
                         group.abort_message.load<std::string>());
}

bool HostTransport::waits_for(int peer) const {
    const auto i = static_cast<size_t>(peer);
    return !out_[i].is_done() || !in_[i].is_done();
}

std::string HostTransport::describe(int peer) const {
    const RankCell& cell = boxes_.rank(peer);
    return concat(" (process ", cell.process.load(), ", last seen in phase '",
                  cell.phase.load<std::string>(), "')");
}

void HostTransport::check_peers(const char* phase, Clock::time_point since) {
    const double waited = std::chrono::duration<double>(Clock::now() - since).count();
    for (int peer = 0; peer < size(); ++peer) {
        if (peer == rank_ || !waits_for(peer)) continue;
        const RankCell& cell = boxes_.rank(peer);
        // What it sent before it closed or died may still be in the ring: the next round reads it.
        const bool nothing_left =
            boxes_.ring(peer, rank_).written.load() == boxes_.ring(peer, rank_).read.load();
        const ProcessState state = state_of(process_of(cell));
        if (nothing_left && cell.has_closed.load(std::memory_order_acquire) != 0)
            fail(peer, phase,
                 concat("rank ", peer, " has closed its transport", describe(peer), " while rank ",
                        rank_, " waits for it in phase '", phase, "'.", kRemedy));
        if (nothing_left && state == ProcessState::kDead)
            fail(peer, phase,
                 concat("rank ", peer, " has died", describe(peer), " while rank ", rank_,
                        " waits for it in phase '", phase,
                        "'. Killed by the out-of-memory killer? Restart it.", kRemedy));
        if (waited > deadline()) fail_late(peer, phase, state == ProcessState::kStopped);
    }
}

void HostTransport::fail_late(int peer, const char* phase, bool is_stopped) {
    fail(peer, phase,
         concat("rank ", peer, " gave no sign in phase '", phase, "' within the deadline of ",
                seconds(deadline()), ": it is ", is_stopped ? "stopped (SIGSTOP)" : "late",
                describe(peer),
                is_stopped ? ". Resume it (SIGCONT) or restart it."
                           : ". If it only works longer, raise the deadline.",
                kRemedy));
}

void HostTransport::fail(int culprit, const char* phase, const std::string& message) {
    post_abort(boxes_, culprit, phase, message);
    throw_if_aborted();
    throw TransportError(culprit, phase, message);
}

void HostTransport::check(const char* phase) {
    throw_if_aborted();
    for (int peer = 0; peer < size(); ++peer)
        if (peer != rank_ && state_of(process_of(boxes_.rank(peer))) == ProcessState::kDead)
            fail(peer, phase,
                 concat("rank ", peer, " has died", describe(peer), " before phase '", phase,
                        "' of rank ", rank_, " was over.", kRemedy));
}

void HostTransport::note(const char* phase) {
    RankCell& cell = boxes_.rank(rank_);
    cell.phase.store(phase);
    cell.notes.fetch_add(1, std::memory_order_release);
}

void HostTransport::blame(const char* phase) {
    check(phase);
    const auto is_stopped = [&](int peer) {
        return state_of(process_of(boxes_.rank(peer))) == ProcessState::kStopped;
    };
    const auto notes = [&](int peer) { return boxes_.rank(peer).notes.load(); };
    int last = rank_;
    for (int peer = 0; peer < size(); ++peer) {
        if (peer != rank_ && is_stopped(peer)) fail_late(peer, phase, true);
        if (notes(peer) < notes(last)) last = peer;
    }
    if (last != rank_) fail_late(last, phase, false);
}

void HostTransport::pass_on(const TransportError& error) {
    post_abort(boxes_, error.rank(), error.phase().c_str(), error.what());
}

void HostTransport::abort(const std::string& reason) noexcept {
    try {
        const auto phase = boxes_.rank(rank_).phase.load<std::string>();
        post_abort(
            boxes_, rank_, phase.c_str(),
            concat("rank ", rank_, " has failed in phase '", phase, "': ", reason, ".", kRemedy));
    } catch (...) {
        post_abort(boxes_, rank_, "", "a rank has failed, and had no memory left to say why");
    }
}

}  // namespace moecore
