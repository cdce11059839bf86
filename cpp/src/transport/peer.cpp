// Ranks on GPUs of one host that reach each other's memory, and virtual ranks on one GPU. A rank
// copies what the others have for it straight out of their memory, by the GPU's copy engines: no
// multiprocessor is taken from the GEMMs, and nothing but the hosts' meetings comes before the
// first byte.

#include "transport/peer.hpp"

#include <algorithm>
#include <cstring>
#include <deque>
#include <optional>

#include "moecore/error.hpp"
#include "moecore/kernels/memory.hpp"
#include "transport/copy_lanes.hpp"
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

/// A rank's events: for threads of its process, and for other processes.
struct SharedEvents {
    void* ready;
    void* done;
    cuda::IpcHandle shared_ready, shared_done;
};

/// What a rank lends the others for one exchange; the counts of what it sends follow.
struct Lent {
    const void* data;
    cuda::ExportedMemory place;
    size_t bytes;  ///< 0: nothing, and no place
};

bool is_same(const ProcessId& a, const ProcessId& b) {
    return a.id == b.id && a.start_time == b.start_time && a.id_namespace == b.id_namespace;
}

/// Events order the copies among streams, and the hosts meet twice, so that nobody records an event
/// that somebody has still to wait for.
class PeerTransport : public Transport {
public:
    PeerTransport(PeerOptions options, const char* kind)
        : hosts_(std::move(options.hosts)),
          kind_(kind),
          device_(options.device),
          memory_(static_cast<size_t>(hosts_->size())) {}

    /// Learns where the others are, and opens their events. Collective.
    void meet() {
        const cuda::DeviceScope scope(device_.index);
        Card mine{.process = ProcessId::current(), .bus_id = {}};
        cuda::bus_id(device_.index).copy(mine.bus_id, sizeof mine.bus_id - 1);
        std::vector<Card> cards(static_cast<size_t>(size()));
        all_gather("connect", &mine, cards.data(), sizeof mine);
        check_reach(cards);
        for (const Card& card : cards) is_here_.push_back(is_same(card.process, mine.process));
        all_are_here_ = std::find(is_here_.begin(), is_here_.end(), false) == is_here_.end();

        const auto use = all_are_here_ ? cuda::Event::Use::kOrder : cuda::Event::Use::kShare;
        ready_.emplace(device_.index, use);
        done_.emplace(device_.index, use);
        lanes_.emplace(device_.index);
        SharedEvents events{.ready = ready_->handle(),
                            .done = done_->handle(),
                            .shared_ready = {},
                            .shared_done = {}};
        if (!all_are_here_) {
            events.shared_ready = cuda::export_event(*ready_);
            events.shared_done = cuda::export_event(*done_);
        }
        std::vector<SharedEvents> everyones(cards.size());
        all_gather("connect", &events, everyones.data(), sizeof events);
        for (size_t r = 0; r < cards.size(); ++r) {
            const SharedEvents& of = everyones[r];
            ready_of_.push_back(is_here_[r] ? of.ready : opened(of.shared_ready));
            done_of_.push_back(is_here_[r] ? of.done : opened(of.shared_done));
        }
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
        const std::vector<int64_t> counts(static_cast<size_t>(size()));
        pull(phase, mine, bytes, counts, stream,
             [&](size_t source, const char* theirs, const int64_t*) {
                 add_copy(static_cast<char*>(all) + source * bytes, theirs, bytes);
             });
    }

    void synchronize(const char* phase, Stream stream) override {
        wait_for_stream(*this, device_, phase, stream, [&] { hosts_->check(phase); });
    }

    void check(const char* phase) override { hosts_->check(phase); }
    void abort(const std::string& reason) noexcept override { hosts_->abort(reason); }

private:
    void pass_on(const TransportError& error) override { hosts_->abort_because(error); }

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

    /// Lends `bytes` of `data`, and makes what find_copies(source, its data, its counts) adds for
    /// every rank.
    template <typename FindCopies>
    void pull(const char* phase, const void* data, size_t bytes, std::span<const int64_t> counts,
              Stream stream, FindCopies&& find_copies) {
        if (ready_of_.empty()) meet();
        const cuda::DeviceScope scope(device_.index);
        const auto ranks = static_cast<size_t>(size());
        const auto me = static_cast<size_t>(rank());
        const size_t count_bytes = ranks * sizeof(int64_t);
        const size_t entry = sizeof(Lent) + count_bytes;
        mine_.resize(entry);
        all_.resize(entry * ranks);
        Lent lent{.data = data, .place = {}, .bytes = bytes};
        if (bytes > 0 && !all_are_here_) lent.place = cuda::export_memory(data);
        std::memcpy(mine_.data(), &lent, sizeof lent);
        std::memcpy(mine_.data() + sizeof lent, counts.data(), count_bytes);

        ready_->record(stream);
        all_gather(phase, mine_.data(), all_.data(), entry);
        copies_.clear();
        // Every rank begins with its right neighbour, so that no GPU has to serve all at once.
        for (size_t i = 1; i <= ranks; ++i) {
            const size_t source = (me + i) % ranks;
            const char* one = all_.data() + source * entry;
            std::memcpy(&lent, one, sizeof lent);
            counts_.resize(ranks);
            std::memcpy(counts_.data(), one + sizeof lent, count_bytes);
            if (source != me) cuda::wait_for(stream, ready_of_[source]);
            const auto* theirs = static_cast<const char*>(lent.data);
            if (lent.bytes > 0 && !is_here_[source])
                theirs = memory_[source].find(lent.place, cuda::wait_for_device);
            find_copies(source, theirs, counts_.data());
        }
        lanes_->run(copies_, stream);
        done_->record(stream);
        hosts_->barrier(phase);
        // What was lent may change only when all have copied it.
        for (size_t source = 0; source < ranks; ++source)
            if (source != me) cuda::wait_for(stream, done_of_[source]);
    }

    std::unique_ptr<Transport> hosts_;
    const char* kind_;
    Device device_;
    std::optional<cuda::Event> ready_, done_;
    std::vector<bool> is_here_;  ///< by rank: a thread of this process
    bool all_are_here_ = false;
    std::vector<void*> ready_of_, done_of_;
    std::deque<cuda::Event> opened_;
    std::optional<CopyLanes> lanes_;
    std::vector<CopyLanes::Copy> copies_;
    std::vector<PeerMemoryCache<>> memory_;  ///< of each rank in another process
    std::vector<char> mine_, all_;
    std::vector<int64_t> counts_;
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
