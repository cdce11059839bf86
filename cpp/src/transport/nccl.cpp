#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <optional>
#include <thread>

#include "moecore/buffer.hpp"
#include "moecore/error.hpp"
#include "moecore/workspace.hpp"
#include "transport/call_watch.hpp"
#include "transport/nccl_library.hpp"
#include "transport/stream_wait.hpp"

namespace moecore {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

/// A rank on a GPU of its own. The ranks meet over a nonblocking communicator, which can be given
/// up at the deadline. Its blocking twin carries the rows: a nonblocking one starts a thread for
/// every group, which takes longer than many a layer's rows. No call into NCCL waits for a peer
/// without the deadline: on expiry the communicators are aborted, which ends their kernels, so that
/// the stream and the process live on.
class NcclTransport : public Transport {
public:
    NcclTransport(NcclOptions options)
        : nccl_(nccl_library(options.library_paths)),
          rank_(options.rank),
          size_(options.size),
          device_(options.device),
          hosts_(std::move(options.hosts)),
          side_(options.device.index),
          staging_(options.device, 0),
          watch_([this] {
              has_expired_ = true;
              end(late_call(""));
          }) {
        const cuda::DeviceScope scope(device_.index);
        NcclUniqueId id;
        std::memcpy(id.bytes, options.unique_id.data(), sizeof id.bytes);
        NcclConfig config;
        nccl_.check(nccl_.comm_init_rank_config(&meeting_, size_, id, rank_, &config),
                    "ncclCommInitRankConfig");
        wait_until_ready("connect", meeting_, options.connect_deadline);
        config.blocking = 1;
        nccl_.check(
            watch_.run(options.connect_deadline,
                       [&] { return nccl_.comm_split(meeting_, 0, rank_, &comm_, &config); }),
            "ncclCommSplit");
        wait_until_ready("connect", meeting_, options.connect_deadline);
        wait_until_ready("connect", comm_, options.connect_deadline);
    }

    ~NcclTransport() override {
        const std::lock_guard lock(mutex_);
        // A graceful end would wait for peers that may be gone.
        abort_communicators();
    }

    int rank() const override { return rank_; }
    int size() const override { return size_; }
    const char* kind() const override { return "nccl"; }
    Device device() const override { return device_; }

    bool can_capture() const override { return true; }

    void all_gather(const char* phase, const void* mine, void* all, size_t bytes) override {
        if (hosts_ != nullptr) {
            hosts_->set_deadline(deadline());
            return hosts_->all_gather(phase, mine, all, bytes);
        }
        const cuda::DeviceScope scope(device_.index);
        const auto ranks = static_cast<size_t>(size_);
        const size_t padded = (bytes + 255) / 256 * 256;  // both parts aligned
        staging_.grow(padded * (ranks + 1));
        char* device_memory =
            staging_.take(DType::kInt32, {static_cast<int64_t>(padded * (ranks + 1) / 4)})
                .as<char>();
        char* host = static_cast<char*>(pinned_.reserve(bytes * ranks + bytes));
        std::memcpy(host, mine, bytes);
        cuda::copy(device_memory, host, bytes, side_.get());
        all_gather_rows(phase, device_memory, device_memory + padded, bytes, side_.get());
        cuda::copy(host + bytes, device_memory + padded, bytes * ranks, side_.get());
        synchronize(phase, side_.get());
        std::memcpy(all, host + bytes, bytes * ranks);
    }

    void all_gather_rows(const char* phase, const void* mine, void* all, size_t bytes,
                         Stream stream) override {
        const cuda::DeviceScope scope(device_.index);
        enqueue(phase, "ncclAllGather", [&] {
            return nccl_.all_gather(mine, all, bytes, kNcclUint8, comm_, stream.handle);
        });
    }

    void all_to_all_v(const char* phase, const RowsToSend& send, const RowsToReceive& recv,
                      size_t row_bytes, Stream stream) override {
        const cuda::DeviceScope scope(device_.index);
        const char* source = static_cast<const char*>(send.data);
        char* target = static_cast<char*>(recv.data);
        enqueue(phase, "ncclSend and ncclRecv", [&] {
            int status = nccl_.group_start();
            for (int r = 0; r < size_; ++r) {
                const auto i = static_cast<size_t>(r);
                const size_t out = static_cast<size_t>(send.counts[i]) * row_bytes;
                const size_t in = static_cast<size_t>(recv.counts[i]) * row_bytes;
                if (r == rank_) {
                    cuda::copy(target, source, in, stream);
                } else {
                    if (out > 0 && status == kNcclSuccess)
                        status = nccl_.send(source, out, kNcclUint8, r, comm_, stream.handle);
                    if (in > 0 && status == kNcclSuccess)
                        status = nccl_.recv(target, in, kNcclUint8, r, comm_, stream.handle);
                }
                source += out;
                target += in;
            }
            const int ended = nccl_.group_end();
            return status == kNcclSuccess ? ended : status;
        });
    }

    void synchronize(const char* phase, Stream stream) override {
        try {
            wait_for_stream(*this, device_, phase, stream, [&] { check_health(phase); });
        } catch (const TransportError& error) {
            give_up(error);
        }
    }

    void abort(const std::string& reason) noexcept override {
        if (hosts_ != nullptr) hosts_->abort(reason);
        end(TransportError(rank_, "",
                           concat("rank ", rank_, " has failed: ", reason,
                                  ". Every rank needs a new transport.")));
    }

private:
    void pass_on(const TransportError& error) override {
        if (hosts_ != nullptr) hosts_->abort_because(error);
        end(error);
    }

    /// Runs a call that puts work on a stream, and waits until NCCL has taken it.
    template <typename Fn>
    void enqueue(const char* phase, const char* what, Fn&& fn) {
        throw_if_ended();
        if (hosts_ != nullptr) hosts_->note(phase);
        const int status = watch_.run(deadline(), fn);
        if (has_expired_) give_up(late_call(phase));
        throw_if_ended();
        nccl_.check(status, what);
    }

    void wait_until_ready(const char* phase, NcclComm* comm, double deadline_s) {
        const Clock::time_point start = Clock::now();
        for (;;) {
            throw_if_ended();
            int status = kNcclSuccess;
            nccl_.check(nccl_.comm_get_async_error(comm, &status), "ncclCommGetAsyncError");
            if (status == kNcclSuccess) return;
            if (status != kNcclInProgress) fail(phase, nccl_.get_error_string(status));
            if (seconds_since(start) > deadline_s)
                fail(phase, concat("no answer within the deadline of ", deadline_s, " s"));
            std::this_thread::yield();
        }
    }

    /// While a stream is late: throws if NCCL or the host group has failed.
    void check_health(const char* phase) {
        throw_if_ended();
        int status = kNcclSuccess;
        nccl_.check(nccl_.comm_get_async_error(comm_, &status), "ncclCommGetAsyncError");
        if (status != kNcclSuccess && status != kNcclInProgress)
            fail(phase, nccl_.get_error_string(status));
        if (hosts_ != nullptr) hosts_->check(phase);
    }

    void throw_if_ended() {
        const std::lock_guard lock(mutex_);
        if (reason_) throw TransportError(*reason_);
    }

    TransportError late_call(const char* phase) const {
        return {-1, phase,
                concat("rank ", rank_, " waited in phase '", phase,
                       "' inside NCCL beyond the deadline of ", deadline(),
                       " s. Look for the rank that stopped; every rank needs a new transport.")};
    }

    [[noreturn]] void fail(const char* phase, const std::string& what) {
        give_up(TransportError(
            -1, phase,
            concat("rank ", rank_, " lost its peers in phase '", phase, "': NCCL says ", what,
                   ". Look for the rank that stopped; every rank needs a new transport.")));
    }

    /// Aborts the communicator and throws `error`, or who is to blame if the hosts know.
    [[noreturn]] void give_up(const TransportError& error) {
        try {
            if (hosts_ != nullptr && error.rank() < 0) {
                hosts_->set_deadline(deadline());
                hosts_->blame(error.phase().c_str());
            }
        } catch (const TransportError& known) {
            end(known);
            throw;
        }
        end(error);
        throw error;
    }

    /// Aborts the communicator; the first reason stays.
    void end(const TransportError& reason) noexcept {
        const std::lock_guard lock(mutex_);
        if (reason_) return;
        reason_ = reason;
        abort_communicators();
    }

    void abort_communicators() noexcept {
        for (NcclComm** comm : {&comm_, &meeting_}) {
            if (*comm != nullptr) nccl_.comm_abort(*comm);
            *comm = nullptr;
        }
    }

    const NcclLibrary& nccl_;
    int rank_, size_;
    Device device_;
    std::unique_ptr<Transport> hosts_;
    NcclComm* comm_ = nullptr;
    NcclComm* meeting_ = nullptr;  ///< its parent
    cuda::OwnedStream side_;       ///< of all_gather
    cuda::PinnedBuffer pinned_;    ///<
    Workspace staging_;            ///<
    std::mutex mutex_;             ///< of reason_, and of the end of comm_
    std::optional<TransportError> reason_;
    std::atomic<bool> has_expired_{false};
    CallWatch watch_;  ///< last: its thread uses the others
};

}  // namespace

std::string nccl_unique_id(const std::vector<std::string>& library_paths) {
    const NcclLibrary& nccl = nccl_library(library_paths);
    NcclUniqueId id;
    nccl.check(nccl.get_unique_id(&id), "ncclGetUniqueId");
    return {id.bytes, sizeof id.bytes};
}

std::unique_ptr<Transport> make_nccl_transport(NcclOptions options) {
    require(options.unique_id.size() == sizeof(NcclUniqueId),
            "make_nccl_transport: unique_id must have 128 bytes, got ", options.unique_id.size());
    require(options.size >= 1, "make_nccl_transport: size must be >= 1, got ", options.size);
    require(options.rank >= 0 && options.rank < options.size,
            "make_nccl_transport: rank must be in [0, size), got ", options.rank, " with size ",
            options.size);
    require(options.device.type == DeviceType::kCuda,
            "make_nccl_transport: device must be a GPU, got ", options.device);
    require(options.hosts == nullptr ||
                (options.hosts->rank() == options.rank && options.hosts->size() == options.size),
            "make_nccl_transport: hosts must have the same rank and size");
    return std::make_unique<NcclTransport>(std::move(options));
}

}  // namespace moecore
