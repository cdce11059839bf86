// Ranks on GPUs of one host that reach each other's memory, and virtual ranks on one GPU. Kernels
// write rows to what others have lent; what only moves is copied out of the others' memory, by the
// GPU's copy engines.

#include "transport/peer.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <optional>

#include "moecore/error.hpp"
#include "moecore/kernels/memory.hpp"
#include "transport/copy_lanes.hpp"
#include "transport/gpu_meeting.hpp"
#include "transport/peer_memory_cache.hpp"
#include "transport/process.hpp"
#include "transport/stream_wait.hpp"

namespace moecore {
namespace {

/// Where a rank is.
struct Card {
    ProcessId process;
    char bus_id[16];
};

/// What ranks wait for on each other's GPUs: what a rank lends is there, and it is done with what
/// the others lend. The last comes in two turns, so that nobody records an event again that
/// somebody has still to wait for.
enum EventName : uint8_t { kReady, kDoneOdd, kDoneEven, kNumEvents };

/// A rank's events: for threads of its process, and for other processes.
struct SharedEvents {
    std::array<void*, kNumEvents> here;
    std::array<cuda::IpcHandle, kNumEvents> elsewhere;
};

/// Memory that a rank lends the others, as they can find it.
struct Lent {
    LentMemory memory;
    cuda::ExportedMemory place;  ///< for other processes; of none if there are no bytes
};

bool is_same(const ProcessId& a, const ProcessId& b) {
    return a.id == b.id && a.start_time == b.start_time && a.id_namespace == b.id_namespace;
}

/// Ranks with a GPU each wait for each other there. Where some share one, events order what they
/// do; before somebody waits for one, the hosts have met.
class PeerTransport : public Transport {
public:
    PeerTransport(PeerOptions options, const char* kind)
        : hosts_(std::move(options.hosts)),
          kind_(kind),
          device_(options.device),
          memory_(static_cast<size_t>(hosts_->size())) {}

    ~PeerTransport() override {
        if (meeting_) meeting_->end();
    }

    /// Learns where the others are, and how to meet them. Collective.
    void meet() {
        const cuda::DeviceScope scope(device_.index);
        Card mine{.process = ProcessId::current(), .bus_id = {}};
        cuda::bus_id(device_.index).copy(mine.bus_id, sizeof mine.bus_id - 1);
        std::vector<Card> cards(static_cast<size_t>(size()));
        all_gather("connect", &mine, cards.data(), sizeof mine);
        check_reach(cards);
        for (const Card& card : cards) is_here_.push_back(is_same(card.process, mine.process));
        all_are_here_ = std::find(is_here_.begin(), is_here_.end(), false) == is_here_.end();
        lanes_.emplace(device_.index);
        if (can_wait_on_gpus(cards))
            meet_on_gpus();
        else
            share_events();
        is_met_ = true;
    }

    int rank() const override { return hosts_->rank(); }
    int size() const override { return hosts_->size(); }
    const char* kind() const override { return kind_; }
    Device device() const override { return device_; }

    void all_gather(const char* phase, const void* mine, void* all, size_t bytes) override {
        hosts_->set_deadline(deadline());
        hosts_->all_gather(phase, mine, all, bytes);
    }

    void all_to_all_v(const char* phase, const RowsToSend& send, const RowsToReceive& recv,
                      size_t row_bytes, Stream stream) override {
        int64_t rows = 0;
        for (const int64_t count : send.counts) rows += count;
        pull(phase, send.data, static_cast<size_t>(rows) * row_bytes, send.counts, stream,
             [&](size_t source, const char* theirs, const int64_t* counts) {
                 int64_t first = 0, arriving = 0;
                 for (int r = 0; r < rank(); ++r) first += counts[r];
                 for (size_t r = 0; r < source; ++r) arriving += recv.counts[r];
                 const auto me = static_cast<size_t>(rank());
                 if (counts[me] != recv.counts[source])
                     throw TransportError(
                         static_cast<int>(source), phase,
                         concat("rank ", source, " is out of step in phase '", phase, "': it sent ",
                                counts[me], " rows, expected ", recv.counts[source]));
                 add_copy(static_cast<char*>(recv.data) + static_cast<size_t>(arriving) * row_bytes,
                          theirs + static_cast<size_t>(first) * row_bytes,
                          static_cast<size_t>(counts[me]) * row_bytes);
             });
    }

    void all_gather_rows(const char* phase, const void* mine, void* all, size_t bytes,
                         Stream stream) override {
        pull(phase, mine, bytes, {}, stream,
             [&](size_t source, const char* theirs, const int64_t*) {
                 add_copy(static_cast<char*>(all) + source * bytes, theirs, bytes);
             });
    }

    bool can_lend() const override { return true; }
    bool loans_last() const override { return true; }
    bool can_capture() const override { return meeting_.has_value(); }

    Loans lend(const char* phase, std::span<const LentMemory> mine, std::span<const int64_t> notes,
               Stream stream) override {
        if (!is_met_) meet();
        const cuda::DeviceScope scope(device_.index);
        const size_t memory_bytes = mine.size() * sizeof(Lent), note_bytes = notes.size_bytes();
        const size_t entry = memory_bytes + note_bytes;
        mine_.resize(entry);
        all_.resize(entry * is_here_.size());
        for (size_t i = 0; i < mine.size(); ++i) {
            Lent lent{.memory = mine[i], .place = {}};
            if (mine[i].bytes > 0 && !all_are_here_) lent.place = cuda::export_memory(mine[i].data);
            std::memcpy(mine_.data() + i * sizeof lent, &lent, sizeof lent);
        }
        if (!notes.empty()) std::memcpy(mine_.data() + memory_bytes, notes.data(), note_bytes);

        if (!meeting_) events_[kReady].record(stream);
        all_gather(phase, mine_.data(), all_.data(), entry);
        if (meeting_)
            meet_on_gpu(phase, stream);
        else
            wait_for_others(kReady, stream);
        Loans loans;
        loans.notes.resize(notes.size() * is_here_.size());
        for (size_t r = 0; r < is_here_.size(); ++r) {
            const char* one = all_.data() + r * entry;
            for (size_t i = 0; i < mine.size(); ++i) {
                Lent lent;
                std::memcpy(&lent, one + i * sizeof lent, sizeof lent);
                if (lent.memory.bytes > 0 && !is_here_[r])
                    lent.memory.data = memory_[r].find(lent.place, cuda::wait_for_device);
                loans.memory.push_back(lent.memory);
            }
            if (!notes.empty())
                std::memcpy(loans.notes.data() + r * notes.size(), one + memory_bytes, note_bytes);
        }
        return loans;
    }

    void finish_writes(const char* phase, Stream stream) override {
        const cuda::DeviceScope scope(device_.index);
        if (meeting_) return meet_on_gpu(phase, stream);
        is_even_ = !is_even_;
        const EventName done = is_even_ ? kDoneEven : kDoneOdd;
        events_[done].record(stream);
        hosts_->barrier(phase);
        wait_for_others(done, stream);
    }

    void synchronize(const char* phase, Stream stream) override {
        try {
            wait_for_stream(*this, device_, phase, stream, [&] { check(phase); });
            check_meetings(phase);
        } catch (const TransportError& error) {
            give_up(error);
        }
    }

    void check(const char* phase) override {
        hosts_->check(phase);
        check_meetings(phase);
    }
    void abort(const std::string& reason) noexcept override {
        hosts_->abort(reason);
        if (meeting_) meeting_->end();
    }

private:
    void pass_on(const TransportError& error) override {
        hosts_->abort_because(error);
        if (meeting_) meeting_->end();
    }

    void meet_on_gpu(const char* phase, Stream stream) {
        check_meetings(phase);
        hosts_->note(phase);
        meeting_->meet(deadline(), stream);
    }

    /// Throws if meetings on the GPUs have ended, naming who was late, or failed. Hosts are asked
    /// only then: that takes longer than a layer's kernels.
    void check_meetings(const char* phase) {
        if (!meeting_ || !meeting_->has_ended()) return;
        hosts_->check(phase);
        const int late = meeting_->late_rank();
        if (late >= 0)
            throw TransportError(
                late, phase,
                concat("rank ", rank(), " waited on its GPU for rank ", late,
                       " beyond the deadline of ", deadline(), " s, and noticed in phase '", phase,
                       "'. Look for the rank that stopped; every rank needs a new transport."));
    }

    /// Lets the GPU's streams run on, and throws `error`, or who is to blame if the hosts know.
    [[noreturn]] void give_up(const TransportError& error) {
        if (!meeting_) throw error;
        try {
            if (error.rank() < 0) {
                hosts_->set_deadline(deadline());
                hosts_->blame(error.phase().c_str());
            }
        } catch (const TransportError&) {
            meeting_->end();
            throw;
        }
        hosts_->abort_because(error);
        meeting_->end();
        throw error;
    }

    void meet_on_gpus() {
        meeting_.emplace(device_.index, rank(), size());
        const cuda::ExportedMemory mine = meeting_->words();
        std::vector<cuda::ExportedMemory> everyones(is_here_.size());
        all_gather("connect", &mine, everyones.data(), sizeof mine);
        try {
            meeting_->connect(everyones);
        } catch (const CudaError& error) {
            throw UnsupportedError(
                concat("make_peer_transport: processes must be able to open each other's memory: ",
                       error.what(), "; use NCCL"));
        }
        hosts_->barrier("connect");  // all have opened what the first to leave would free
    }

    void share_events() {
        const auto use = all_are_here_ ? cuda::Event::Use::kOrder : cuda::Event::Use::kShare;
        SharedEvents mine_of{};
        for (size_t i = 0; i < kNumEvents; ++i) {
            events_.emplace_back(device_.index, use);
            mine_of.here[i] = events_[i].handle();
            if (!all_are_here_) mine_of.elsewhere[i] = cuda::export_event(events_[i]);
        }
        std::vector<SharedEvents> everyones(is_here_.size());
        all_gather("connect", &mine_of, everyones.data(), sizeof mine_of);
        for (size_t r = 0; r < is_here_.size(); ++r) {
            auto& events = events_of_.emplace_back(everyones[r].here);
            if (!is_here_[r])
                for (size_t i = 0; i < kNumEvents; ++i)
                    events[i] = opened(everyones[r].elsewhere[i]);
        }
    }

    /// Whether a rank can wait for another within its stream. It would keep its GPU from a rank
    /// that shares it; and between threads of one process, on two GPUs, such waits passed the
    /// deadline.
    static bool can_wait_on_gpus(const std::vector<Card>& cards) {
        if (cards.size() > SignalArgs::kMaxRanks) return false;
        for (size_t a = 0; a < cards.size(); ++a)
            for (size_t b = 0; b < a; ++b)
                if (is_same(cards[a].process, cards[b].process) ||
                    std::strncmp(cards[a].bus_id, cards[b].bus_id, sizeof cards[a].bus_id) == 0)
                    return false;
        return true;
    }

    /// Throws on every rank if one's GPU does not reach another's memory.
    void check_reach(const std::vector<Card>& cards) {
        int unreachable = -1;
        for (size_t r = 0; r < cards.size(); ++r) {
            const int device = cuda::device_with(cards[r].bus_id);
            if (device >= 0 && !cuda::reach(device)) unreachable = static_cast<int>(r);
        }
        std::vector<int> everyones(cards.size());
        all_gather("connect", &unreachable, everyones.data(), sizeof unreachable);
        for (size_t r = 0; r < everyones.size(); ++r)
            if (everyones[r] >= 0)
                throw UnsupportedError(concat(
                    "make_peer_transport: every GPU must reach every other's memory, but that of "
                    "rank ",
                    r, " does not reach that of rank ", everyones[r], "; use NCCL"));
    }

    void* opened(const cuda::IpcHandle& event) {
        opened_.push_back(cuda::open_event(event, device_.index));
        return opened_.back().handle();
    }

    void add_copy(char* target, const char* source, size_t bytes) {
        if (bytes > 0) copies_.push_back({target, source, bytes});
    }

    void wait_for_others(EventName event, Stream stream) {
        for (size_t r = 0; r < events_of_.size(); ++r)
            if (r != static_cast<size_t>(rank())) cuda::wait_for(stream, events_of_[r][event]);
    }

    /// Lends `bytes` of `data`, and makes what find_copies(source, its data, its counts) adds for
    /// every rank.
    template <typename FindCopies>
    void pull(const char* phase, const void* data, size_t bytes, std::span<const int64_t> counts,
              Stream stream, FindCopies&& find_copies) {
        const LentMemory mine{const_cast<void*>(data), bytes};
        const Loans loans = lend(phase, {&mine, 1}, counts, stream);
        const cuda::DeviceScope scope(device_.index);
        copies_.clear();
        // Every rank begins with its right neighbour, so that no GPU has to serve all at once.
        const size_t ranks = loans.memory.size(), me = static_cast<size_t>(rank());
        for (size_t i = 1; i <= ranks; ++i) {
            const size_t source = (me + i) % ranks;
            find_copies(source, static_cast<const char*>(loans.memory[source].data),
                        loans.notes.data() + source * counts.size());
        }
        lanes_->run(copies_, stream);
        finish_writes(phase, stream);  // what was lent may change only when all have copied it
    }

    std::unique_ptr<Transport> hosts_;
    const char* kind_;
    Device device_;
    std::deque<cuda::Event> events_;
    std::vector<bool> is_here_;  ///< by rank: a thread of this process
    bool all_are_here_ = false;
    std::vector<std::array<void*, kNumEvents>> events_of_;  ///< by rank
    bool is_even_ = false;
    std::deque<cuda::Event> opened_;
    std::optional<GpuMeeting> meeting_;  ///< else events order what ranks do
    bool is_met_ = false;
    std::optional<CopyLanes> lanes_;
    std::vector<CopyLanes::Copy> copies_;
    std::vector<PeerMemoryCache<>> memory_;  ///< of each rank in another process
    std::vector<char> mine_, all_;
};

}  // namespace

std::unique_ptr<Transport> make_peer_transport(PeerOptions options) {
    require(options.hosts != nullptr, "make_peer_transport: hosts must be given, got none");
    require(options.hosts->device().type == DeviceType::kCpu,
            "make_peer_transport: hosts must be a transport of host memory, got one of ",
            options.hosts->device());
    require(options.device.type == DeviceType::kCuda,
            "make_peer_transport: device must be a GPU, got ", options.device);
    auto transport = std::make_unique<PeerTransport>(std::move(options), "peer");
    transport->meet();
    return transport;
}

std::unique_ptr<Transport> make_unmet_peer_transport(PeerOptions options, const char* kind) {
    return std::make_unique<PeerTransport>(std::move(options), kind);
}

}  // namespace moecore
