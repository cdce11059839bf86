#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "runtime/all_to_all.hpp"
#include "runtime/lent_rows.hpp"

namespace moecore {

/// What calls of one shape share: all ranks have agreed on it, and its memory never moves, so that
/// a captured CUDA graph may keep its addresses.
struct FixedShape {
    MoEConfig config;
    int64_t fixed_tokens;  ///< F of every call, or 0: each call has its own, and may move memory
    Buffer first_experts;  ///< [2 + P + 1] int32: the two below
    Workspace workspace;
    std::optional<SharedPlaces> places;  ///< of a call before, where ranks write to each other

    TensorView all_experts() const;  ///< [2] first expert and end of one rank with all
    TensorView owners() const;       ///< [P + 1] first expert of each rank, and the end
};

/// The shape among `known` that fits the call, or nullptr.
FixedShape* find_shape(const std::vector<std::unique_ptr<FixedShape>>& known,
                       const MoEConfig& config, int64_t fixed_tokens);

std::unique_ptr<FixedShape> make_shape(const MoEConfig& config, int64_t fixed_tokens,
                                       const std::vector<ExpertRange>& ranges, Device device);

/// One layer by Schedule::kAllGather: every rank gets all tokens, runs its own experts on them, and
/// returns one row for every slot to the token's owner. Where ranks write to each other's memory,
/// tokens and results go straight to where they belong. All shapes follow from F = tokens_per_rank,
/// which is >= T on every rank, so no host waits for a device, and a call of a fixed shape can be
/// captured in a CUDA graph once another has run.
void run_all_gather(EpResources& resources, const ExpertParallel::Call& call, FixedShape& shape,
                    int64_t tokens_per_rank, Stream stream);

}  // namespace moecore
