#include <sched.h>
#include <unistd.h>

#include <bit>
#include <chrono>
#include <cstring>

#include "moecore/error.hpp"
#include "transport/host_transport.hpp"
#include "transport/ring_size.hpp"
#include "transport/shm_segment.hpp"

namespace moecore {
namespace {

using Clock = std::chrono::steady_clock;
constexpr const char* kPhase = "connect";

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

void check_options(const ShmOptions& options) {
    const auto is_allowed = [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
               c == '_' || c == '.' || c == '-';
    };
    bool is_name = !options.name.empty() && options.name.size() <= 200;
    for (const char c : options.name) is_name = is_name && is_allowed(c);
    require(is_name, "make_shm_transport: name must be 1 to 200 of A-Z a-z 0-9 _ . -, got '",
            options.name, "'");
    require(options.size >= 1 && options.size <= kMaxHostRanks,
            "make_shm_transport: size must be in [1, ", kMaxHostRanks, "], got ", options.size);
    require(options.rank >= 0 && options.rank < options.size,
            "make_shm_transport: rank must be in [0, size), got ", options.rank, " with size ",
            options.size);
    require(options.connect_deadline > 0,
            "make_shm_transport: connect_deadline must be > 0 seconds, got ",
            options.connect_deadline);
    require(options.ring_bytes == 0 ||
                (options.ring_bytes >= 64 && std::has_single_bit(options.ring_bytes)),
            "make_shm_transport: ring_bytes must be a power of two >= 64, or 0, got ",
            options.ring_bytes);
}

std::shared_ptr<ShmSegment> create_segment(const std::string& name, const ShmOptions& options) {
    const size_t ring_bytes =
        options.ring_bytes == 0 ? default_ring_bytes(options.size) : options.ring_bytes;
    auto segment = ShmSegment::create(name, Mailboxes::bytes_for(options.size, ring_bytes));
    GroupCell& group = Mailboxes(segment->data(), options.size, ring_bytes).group();
    group.size = options.size;
    group.ring_bytes = ring_bytes;
    group.magic.store(GroupCell::kMagic, std::memory_order_release);
    return segment;
}

/// Waits until rank 0 has made the segment.
std::shared_ptr<ShmSegment> open_segment(const std::string& name, const ShmOptions& options) {
    const Clock::time_point start = Clock::now();
    for (;;) {
        auto segment = ShmSegment::open(name);
        if (segment != nullptr && segment->size_bytes() >= sizeof(GroupCell) &&
            static_cast<GroupCell*>(segment->data())->magic.load(std::memory_order_acquire) ==
                GroupCell::kMagic)
            return segment;
        if (seconds_since(start) > options.connect_deadline)
            throw TransportError(0, kPhase,
                                 concat("rank 0 has not created /dev/shm", name,
                                        " within the deadline of ", options.connect_deadline,
                                        " s. Start it on this host, with the same name, or raise "
                                        "connect_deadline."));
        usleep(2000);
    }
}

/// Enters this process as `rank`. The id is stored last: whoever sees it may read the rest.
void enter(const Mailboxes& boxes, int rank) {
    constexpr int32_t kNobody = 0, kEntering = -1;
    const ProcessId self = ProcessId::current();
    RankCell& cell = boxes.rank(rank);
    int32_t taken_by = kNobody;
    if (!cell.process.compare_exchange_strong(taken_by, kEntering))
        throw InvalidArgument(concat("make_shm_transport: rank must be free, got ", rank,
                                     ", which process ", taken_by, " has taken"));
    cell.process_start = self.start_time;
    cell.process_namespace = self.id_namespace;
    cell.phase.store(kPhase);
    cell.process = self.id;
}

/// Returns when every rank has entered; throws with the first that is missing or dead.
void wait_for_all(const Mailboxes& boxes, const ShmOptions& options) {
    const Clock::time_point start = Clock::now();
    const GroupCell& group = boxes.group();
    for (;;) {
        int missing = -1, dead = -1;
        for (int r = boxes.size() - 1; r >= 0; --r) {
            const RankCell& cell = boxes.rank(r);
            if (cell.process.load() <= 0)
                missing = r;
            else if (cell.has_closed.load() != 0 ||
                     state_of(process_of(cell)) == ProcessState::kDead)
                dead = r;
        }
        if (group.abort_state.load(std::memory_order_acquire) == 2)
            throw TransportError(group.abort_rank.load(), kPhase,
                                 group.abort_message.load<std::string>());
        if (missing < 0) return;
        const bool is_late = seconds_since(start) > options.connect_deadline;
        if (dead < 0 && !is_late) {
            usleep(1000);
            continue;
        }
        const int culprit = dead >= 0 ? dead : missing;
        const std::string what =
            dead >= 0
                ? concat("rank ", dead, " (process ", boxes.rank(dead).process.load(),
                         ") has died before all ranks were there. See its log.")
                : concat("rank ", missing, " of ", boxes.size(),
                         " has not connected within the deadline of ", options.connect_deadline,
                         " s. Start it on this host, with the same name, or raise "
                         "connect_deadline.");
        post_abort(boxes, culprit, kPhase, what);
        throw TransportError(culprit, kPhase, what);
    }
}

/// A transport of another size than the segment's is a mistake that rank 0 must hear of too.
void check_size(const GroupCell& group, void* memory, const ShmOptions& options) {
    const int size = group.size.load();
    if (size == options.size) return;
    const std::string what =
        concat("rank ", options.rank, " was started with size ", options.size,
               ", rank 0 with size ", size, ". Start all ranks with the same size.");
    post_abort(Mailboxes(memory, size, group.ring_bytes.load()), options.rank, kPhase, what);
    throw TransportError(options.rank, kPhase, what);
}

}  // namespace

std::unique_ptr<Transport> make_shm_transport(const ShmOptions& options) {
    check_options(options);
    const std::string name = "/moecore." + options.name;
    const auto segment =
        options.rank == 0 ? create_segment(name, options) : open_segment(name, options);
    GroupCell& group = *static_cast<GroupCell*>(segment->data());
    check_size(group, segment->data(), options);
    const Mailboxes boxes(segment->data(), options.size, group.ring_bytes.load());
    enter(boxes, options.rank);
    auto transport = std::make_unique<HostTransport>("shm", segment, boxes, options.rank, false);
    try {
        wait_for_all(boxes, options);
    } catch (const TransportError&) {
        // Rank 0 removes the name when it leaves; in its place, whoever sees it dead.
        if (state_of(process_of(boxes.rank(0))) == ProcessState::kDead) segment->unlink();
        throw;
    }
    segment->unlink();
    return transport;
}

}  // namespace moecore
