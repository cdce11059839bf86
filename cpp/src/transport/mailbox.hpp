#pragma once

// Memory that the ranks of one host share: a cell a rank, and a ring of bytes for each ordered pair
// of ranks. It holds no pointer, so it may lie at another address in every process.

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace moecore {

inline constexpr int kMaxHostRanks = 256;

/// A short text that others may read while it changes: they may see a mixture, never a fault.
template <size_t kWords>
class SharedText {
public:
    void store(const char* text) {
        bool ended = false;
        for (std::atomic<uint64_t>& word : words_) {
            uint64_t packed = 0;
            for (int i = 0; i < 8 && !ended; ++i) {
                ended = *text == '\0';
                if (!ended) packed |= uint64_t{static_cast<unsigned char>(*text++)} << 8 * i;
            }
            word.store(packed, std::memory_order_relaxed);
        }
    }
    template <typename String>
    String load() const {
        String text;
        for (const std::atomic<uint64_t>& word : words_) {
            const uint64_t packed = word.load(std::memory_order_relaxed);
            for (int i = 0; i < 8; ++i) {
                const char c = static_cast<char>(packed >> 8 * i & 0xff);
                if (c == '\0') return text;
                text += c;
            }
        }
        return text;
    }

private:
    std::atomic<uint64_t> words_[kWords];
};

/// What one rank tells the others.
struct alignas(128) RankCell {
    std::atomic<uint32_t> doorbell;   ///< rises whenever a ring of this rank has changed
    std::atomic<uint32_t> is_asleep;  ///< waits for the doorbell in the kernel
    std::atomic<int32_t> process;     ///< 0 until the rank has connected
    std::atomic<uint32_t> has_closed;
    std::atomic<uint64_t> process_start;      ///< tells a process from a later one of the same id
    std::atomic<uint64_t> process_namespace;  ///< within which `process` means something
    std::atomic<uint64_t> notes;              ///< phases of another transport that it has entered
    SharedText<6> phase;                      ///< where it is, or was last
};

/// One for the group.
struct alignas(128) GroupCell {
    static constexpr uint64_t kMagic = 0x31306570656f636dull;  // "mcoepe01"

    std::atomic<uint64_t> magic;  ///< written last
    std::atomic<int32_t> size;
    std::atomic<uint64_t> ring_bytes;
    std::atomic<uint32_t> abort_state;  ///< 0 none, 1 being written, 2 there
    std::atomic<int32_t> abort_rank;    ///< who is at fault
    SharedText<6> abort_phase;
    SharedText<64> abort_message;
};

/// Positions of the bytes that one rank sends another; they only rise.
struct RingCell {
    alignas(64) std::atomic<uint64_t> written;
    alignas(64) std::atomic<uint64_t> read;
};

/// Where things are. REQUIRES: `memory` aligned to 128 bytes, zero before its first use.
class Mailboxes {
public:
    static size_t bytes_for(int size, size_t ring_bytes) {
        const auto ranks = static_cast<size_t>(size);
        return sizeof(GroupCell) + ranks * sizeof(RankCell) +
               ranks * ranks * (sizeof(RingCell) + ring_bytes);
    }
    Mailboxes(void* memory, int size, size_t ring_bytes)
        : memory_(static_cast<char*>(memory)), size_(size), ring_bytes_(ring_bytes) {}

    GroupCell& group() const { return *reinterpret_cast<GroupCell*>(memory_); }
    RankCell& rank(int rank) const {
        return reinterpret_cast<RankCell*>(memory_ + sizeof(GroupCell))[rank];
    }
    RingCell& ring(int source, int destination) const {
        const size_t cells = sizeof(GroupCell) + static_cast<size_t>(size_) * sizeof(RankCell);
        return reinterpret_cast<RingCell*>(memory_ + cells)[pair(source, destination)];
    }
    char* ring_data(int source, int destination) const {
        return memory_ + bytes_for(size_, 0) + pair(source, destination) * ring_bytes_;
    }
    int size() const { return size_; }
    size_t ring_bytes() const { return ring_bytes_; }

private:
    size_t pair(int source, int destination) const {
        return static_cast<size_t>(source) * static_cast<size_t>(size_) +
               static_cast<size_t>(destination);
    }

    char* memory_;
    int size_;
    size_t ring_bytes_;
};

static_assert(std::atomic<uint64_t>::is_always_lock_free, "ranks share no locks");

}  // namespace moecore
