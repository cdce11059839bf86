#pragma once

#include <cstdint>

#include "moecore/stream.hpp"

namespace moecore {

/// How a meeting of ranks on their GPUs has ended: memory of the host that the GPU reaches.
struct MeetingState {
    uint32_t is_over;  ///< not 0: nobody waits any more, now and in every later meeting
    int32_t late;      ///< 1 + the rank that did not come in time, 0 for none
};

/// What a rank needs to meet the others: a word a rank, one that counts its own meetings, and one
/// that says whether one of them has failed.
struct SignalArgs {
    static constexpr int kMaxRanks = 64;

    uint32_t* words;              ///< [kMaxRanks + 2] of this rank's GPU, zero at first
    uint32_t* theirs[kMaxRanks];  ///< those of each rank
    int rank, num_ranks;
    uint64_t limit_ns;  ///< of the wait
    MeetingState* state;
};

namespace cuda {
/// What `stream` gets next sees all that every rank has written before its own call of this.
void meet(const SignalArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
