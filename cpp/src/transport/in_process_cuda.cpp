#include "transport/in_process_cuda.hpp"

#include <chrono>
#include <thread>

#include "moecore/error.hpp"
#include "moecore/kernels/device_queue.hpp"
#include "moecore/kernels/memory.hpp"
#include "transport/stream_wait.hpp"

namespace moecore {
namespace {

/// What a rank lends its peers for one exchange; only threads of one process can use it.
struct Lent {
    const void* data;
    void* ready;  ///< event: the rows are there
};

/// Virtual ranks on one GPU. Peers copy each other's rows; events order the copies among streams,
/// and the hosts meet twice, so that nobody records an event that somebody has still to wait for.
class InProcessCudaTransport : public Transport {
public:
    InProcessCudaTransport(std::unique_ptr<Transport> hosts, Device device)
        : hosts_(std::move(hosts)), device_(device), ready_(device.index), done_(device.index) {}

    int rank() const override { return hosts_->rank(); }
    int size() const override { return hosts_->size(); }
    const char* kind() const override { return "in_process"; }
    Device device() const override { return device_; }

    void all_gather(const char* phase, const void* mine, void* all, size_t bytes) override {
        hosts_->set_deadline(deadline());
        hosts_->all_gather(phase, mine, all, bytes);
    }

    void all_to_all_v(const char* phase, const RowsToSend& send, const RowsToReceive& recv,
                      size_t row_bytes, Stream stream) override {
        const auto ranks = static_cast<size_t>(size());
        std::vector<int64_t> all_counts(ranks * ranks);
        all_gather(phase, send.counts.data(), all_counts.data(), ranks * sizeof(int64_t));
        pull(phase, send.data, stream, [&](size_t source, const char* rows) {
            const int64_t* counts = all_counts.data() + source * ranks;
            int64_t first = 0, arriving = 0;
            for (int r = 0; r < rank(); ++r) first += counts[r];
            for (size_t r = 0; r < source; ++r) arriving += recv.counts[r];
            const auto me = static_cast<size_t>(rank());
            if (counts[me] != recv.counts[source])
                throw TransportError(
                    static_cast<int>(source), phase,
                    concat("rank ", source, " is out of step in phase '", phase, "': it sent ",
                           counts[me], " rows, expected ", recv.counts[source]));
            cuda::copy(static_cast<char*>(recv.data) + static_cast<size_t>(arriving) * row_bytes,
                       rows + static_cast<size_t>(first) * row_bytes,
                       static_cast<size_t>(counts[me]) * row_bytes, stream);
        });
    }

    void all_gather_rows(const char* phase, const void* mine, void* all, size_t bytes,
                         Stream stream) override {
        pull(phase, mine, stream, [&](size_t source, const char* rows) {
            cuda::copy(static_cast<char*>(all) + source * bytes, rows, bytes, stream);
        });
    }

    void synchronize(const char* phase, Stream stream) override {
        wait_for_stream(*this, device_, phase, stream, [] {});
    }

    void abort(const std::string& reason) noexcept override { hosts_->abort(reason); }

private:
    /// Lends `data`, and calls copy_from(source, its data) on `stream` for every rank.
    template <typename CopyFrom>
    void pull(const char* phase, const void* data, Stream stream, CopyFrom&& copy_from) {
        const cuda::DeviceScope scope(device_.index);
        ready_.record(stream);
        const Lent mine{data, ready_.handle()};
        std::vector<Lent> all(static_cast<size_t>(size()));
        all_gather(phase, &mine, all.data(), sizeof mine);
        for (size_t source = 0; source < all.size(); ++source) {
            if (static_cast<int>(source) != rank()) cuda::wait_for(stream, all[source].ready);
            copy_from(source, static_cast<const char*>(all[source].data));
        }
        done_.record(stream);
        void* handle = done_.handle();
        std::vector<void*> others(all.size());
        all_gather(phase, &handle, others.data(), sizeof handle);
        // What was lent may change only when all have copied it.
        for (void* event : others)
            if (event != handle) cuda::wait_for(stream, event);
    }

    std::unique_ptr<Transport> hosts_;
    Device device_;
    cuda::Event ready_, done_;
};

}  // namespace

std::unique_ptr<Transport> make_in_process_cuda_transport(std::unique_ptr<Transport> hosts,
                                                          Device device) {
    return std::make_unique<InProcessCudaTransport>(std::move(hosts), device);
}

}  // namespace moecore
