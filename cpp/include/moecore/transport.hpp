#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// A rank of the group is dead, late, out of step, or has aborted. The message says which, in what
/// phase, and what to do. The group is lost: every rank needs a new transport.
class TransportError : public std::runtime_error {
public:
    TransportError(int rank, std::string phase, const std::string& message)
        : std::runtime_error(message), rank_(rank), phase_(std::move(phase)) {}

    int rank() const { return rank_; }  ///< the rank at fault, -1 if nobody knows
    const std::string& phase() const { return phase_; }

private:
    int rank_;
    std::string phase_;
};

/// Rows for every rank, those for rank 0 first: counts[r] rows for rank r. The i-th of all is row
/// `index ? index[i] : i` of data.
struct RowsToSend {
    const void* data = nullptr;
    size_t row_stride = 0;           ///< bytes from row to row of data; used with index only
    const int32_t* index = nullptr;  ///< host memory; only where the transport's device is the CPU
    std::span<const int64_t> counts;
};

/// Room for counts[r] rows from every rank r, those of rank 0 first.
struct RowsToReceive {
    void* data = nullptr;
    std::span<const int64_t> counts;
};

/// Memory that a rank lends the others, whose kernels write to it.
struct LentMemory {
    void* data = nullptr;
    size_t bytes = 0;  ///< 0: none
};

/// What every rank lends, and says of it: those of rank 0 first.
struct Loans {
    std::vector<LentMemory> memory;
    std::vector<int64_t> notes;
};

/// What a group of ranks exchanges bytes with. Every rank makes the same calls in the same order;
/// one thread at a time may be inside. A wait ends by the deadline: whoever hears nothing from a
/// rank for that long throws TransportError, and so does everybody else. `phase` names the call in
/// messages, and must agree between ranks.
class Transport {
public:
    virtual ~Transport() = default;
    Transport() = default;
    Transport(const Transport&) = delete;
    Transport& operator=(const Transport&) = delete;

    virtual int rank() const = 0;
    virtual int size() const = 0;
    virtual const char* kind() const = 0;
    virtual Device device() const { return {}; }  ///< where all_to_all_v's rows are

    /// all + r * bytes = what rank r gave as `mine`. Host memory; blocks.
    virtual void all_gather(const char* phase, const void* mine, void* all, size_t bytes) = 0;

    /// Moves rows of `row_bytes` bytes. What is sent to a rank must be what it expects. On the CPU
    /// it blocks until everything has arrived; on CUDA it is ordered on `stream`.
    virtual void all_to_all_v(const char* phase, const RowsToSend& send, const RowsToReceive& recv,
                              size_t row_bytes, Stream stream) = 0;

    /// The same for memory of device(): all + r * bytes = what rank r gave. On CUDA ordered on
    /// `stream`.
    virtual void all_gather_rows(const char* phase, const void* mine, void* all, size_t bytes,
                                 Stream stream);

    /// Whether kernels of a rank can write to the others' memory: whether lend() works.
    virtual bool can_lend() const { return false; }

    /// Lends `mine`, memory of device(), and gets what the others lend: what is put on `stream`
    /// from now on may write there, until this rank's second finish_writes(). Every rank gives as
    /// many of each. Throws UnsupportedError where can_lend() is false.
    virtual Loans lend(const char* phase, std::span<const LentMemory> mine,
                       std::span<const int64_t> notes, Stream stream);

    /// Whether what was lent once may be written to as long as it is there, if all ranks are
    /// through with what it held.
    virtual bool loans_last() const { return false; }

    /// Lets what is put on `stream` from now on see what every rank has written to lent memory
    /// before its own call of this.
    virtual void finish_writes(const char* phase, Stream stream);

    /// Whether its calls on a stream can be captured in a CUDA graph, once they have been made.
    virtual bool can_capture() const { return false; }

    /// Waits for `stream` until the deadline. Does nothing on the CPU.
    virtual void synchronize(const char* /*phase*/, Stream /*stream*/) {}

    /// Throws if the group has been aborted or a rank has died. Does not wait.
    virtual void check(const char* /*phase*/) {}

    /// After a wait of this rank that ended at the deadline outside of this transport: throws, for
    /// every rank, naming a rank that is dead, stopped, or has made fewer calls of note().
    virtual void blame(const char* /*phase*/) {}

    /// Tells the group that this rank enters `phase`, for the sake of blame().
    virtual void note(const char* /*phase*/) {}

    /// Returns when every rank has called it.
    void barrier(const char* phase);

    /// Makes every rank's current and next call throw an error that names this rank and `reason`.
    /// From any thread; the first reason stays.
    virtual void abort(const std::string& reason) noexcept = 0;

    /// abort() because of an error that this rank has met. One that names a rank reaches the others
    /// as it is: who sees a mistake first has not made it.
    void abort_because(const std::exception& error);

    /// Seconds without a sign of a peer after which a wait throws.
    double deadline() const { return deadline_; }
    void set_deadline(double seconds);  ///< Throws InvalidArgument unless seconds > 0.

private:
    /// abort_because() of an error that names a rank.
    virtual void pass_on(const TransportError& error) { abort(error.what()); }

    double deadline_ = 30.0;
};

/// The experts that rank `rank` of `size` owns: [first, first + count), contiguous, sizes differ by
/// at most one. Throws InvalidArgument unless 0 <= rank < size <= num_experts.
struct ExpertRange {
    int first = 0;
    int count = 0;
};
ExpertRange expert_range(int num_experts, int rank, int size);

/// A group of one rank.
std::unique_ptr<Transport> make_loopback_transport(Device device = {});

/// `size` ranks that are threads of this process: give one transport to each. On CUDA they are
/// virtual ranks on one GPU, whose transports connect at their first exchange.
std::vector<std::unique_ptr<Transport>> make_in_process_transports(int size, Device device = {});

struct ShmOptions {
    std::string name;  ///< of the run: [A-Za-z0-9_.-]+, the same on every rank
    int rank = 0;
    int size = 0;
    double connect_deadline = 120.0;  ///< seconds until every rank must be there
    size_t ring_bytes = 0;            ///< of each ordered pair of ranks; 0 chooses by size
};

/// Ranks that are processes of one host, over POSIX shared memory. Returns when all ranks are
/// there. The segment has no name from then on, so no death leaves it behind; one that a crashed
/// run left is replaced. Throws InvalidArgument, or TransportError that names who is missing.
std::unique_ptr<Transport> make_shm_transport(const ShmOptions& options);

struct PeerOptions {
    std::unique_ptr<Transport> hosts;  ///< how the hosts of the same ranks meet
    Device device;                     ///< this rank's GPU; several ranks may share one
};

/// Ranks on GPUs of one host that write to and copy out of each other's memory: threads of a
/// process or processes. Rows to send, and what is lent, must lie in memory of a Buffer. Processes
/// with a GPU each wait for each other there, and CUDA graphs can capture them; else no graph can.
/// Returns when all ranks are there. Throws InvalidArgument, CudaError, TransportError, or
/// UnsupportedError if a GPU does not reach another's memory.
std::unique_ptr<Transport> make_peer_transport(PeerOptions options);

struct NcclOptions {
    std::string unique_id;  ///< of the group: nccl_unique_id() of one rank, given to all
    int rank = 0;
    int size = 0;
    Device device;                           ///< this rank's GPU
    double connect_deadline = 120.0;         ///< seconds until every rank must be there
    std::vector<std::string> library_paths;  ///< where libnccl.so.2 may be
    /// How the hosts of the same ranks meet, if they are on one machine: it tells the death of a
    /// rank at once, by name. Without it NCCL carries what the hosts exchange.
    std::unique_ptr<Transport> hosts;
};

/// Ranks with a GPU each, over NCCL, which is loaded at first use: MOECORE_NCCL if it is set, else
/// the copy of this process, `library_paths`, the system. Returns when all ranks are there.
/// Throws InvalidArgument, UnsupportedError without NCCL 2.18 or newer, NcclError, TransportError.
std::unique_ptr<Transport> make_nccl_transport(NcclOptions options);
std::string nccl_unique_id(const std::vector<std::string>& library_paths = {});

}  // namespace moecore
