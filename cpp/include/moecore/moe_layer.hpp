#pragma once

#include <cstdint>

#include "moecore/ep_schedule.hpp"
#include "moecore/grouped_gemm.hpp"
#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"
#include "moecore/topk_routing.hpp"
#include "moecore/workspace.hpp"

namespace moecore {

class ExpertParallel;

/// The sizes and the mathematics of one MoE layer.
struct MoEConfig {
    int64_t hidden_size = 0;        ///< H
    int64_t intermediate_size = 0;  ///< I, of one expert
    int num_experts = 0;            ///< E, over all ranks
    int first_expert = 0;           ///< this rank's experts are first_expert .. + E_local - 1
    int num_local_experts = 0;      ///< E_local
    RoutingConfig routing;
    GroupedGemmConfig activation;          ///< of the experts and the shared expert
    int64_t shared_intermediate_size = 0;  ///< of the shared expert; 0 for none
    DType dtype = DType::kBFloat16;        ///< of weights, hidden states and output
};

/// A layer's weights, borrowed: they must outlive the layer. H, I, E as in MoEConfig, S the shared
/// expert's intermediate size.
struct MoEWeights {
    GroupedGemmWeights gate_up;         ///< [E_local, 2 I, H]
    GroupedGemmWeights down;            ///< [E_local, H, I]
    TensorView gate_up_bias;            ///< [E_local, 2 I] float32 or config.dtype, or absent
    TensorView down_bias;               ///< [E_local, H], likewise
    TensorView selection_bias;          ///< [E] float32, or absent
    GroupedGemmWeights shared_gate_up;  ///< [2 S, H]; with S > 0
    GroupedGemmWeights shared_down;     ///< [H, S]; with S > 0
    TensorView shared_gate;             ///< [1, H]: the shared output is scaled by
                                        ///< sigmoid(hidden_states @ shared_gate.T); or absent
};

/// How results of experts on other ranks come back.
enum class CombineMode : uint8_t {
    kExact,  ///< each route's row to the token's owner, added in the order of choices: the bits of
             ///< one rank with all experts
    kFast,   ///< one row a token and rank, its routes already added: fewer bytes, other bits
};

/// How a layer works across ranks. The same on every rank; kExact's bits do not depend on the rest.
struct ExpertParallelConfig {
    CombineMode combine = CombineMode::kExact;
    Schedule schedule = Schedule::kAuto;
    int num_groups = 0;  ///< pipeline stages over the local experts, <= 64; 0 chooses by cost
    /// With kAllGather: the largest T of any rank's calls, so that no host exchange precedes them
    /// after the first, and they can be captured in a CUDA graph. 0: agreed on in every call.
    int64_t fixed_tokens = 0;
};

/// One MoE layer on one rank: route, sort, two grouped GEMMs, combine. Immutable after construction
/// and thread-safe: all scratch memory is the caller's Workspace. With an ExpertParallel it spans
/// ranks: every call is collective, and one at a time.
class MoELayer {
public:
    /// Throws InvalidArgument if the shape, dtype or strides of a weight do not fit `config`, or it
    /// is on another device than gate_up; the message names it.
    MoELayer(const MoEConfig& config, const MoEWeights& weights);

    /// A layer whose other experts are on the other ranks of `ranks`, which must outlive it.
    MoELayer(const MoEConfig& config, const MoEWeights& weights, ExpertParallel& ranks,
             const ExpertParallelConfig& how = {});

    /// Workspace bytes for any routing of up to `max_tokens` tokens.
    size_t workspace_bytes(int64_t max_tokens) const;

    /// Throws what forward would throw of these two, so that a workspace can be sized by their T.
    void check_call(const TensorView& hidden_states, const TensorView& output) const;

    /// output = the layer's output for T tokens; T may be 0. Takes from `workspace` and resets it.
    /// hidden_states [T, H] of config.dtype, router_logits [T, E] float32 or bfloat16,
    /// output [T, H] of config.dtype, overlapping nothing else.
    void forward(const TensorView& hidden_states, const TensorView& router_logits,
                 const TensorView& output, Workspace& workspace, Stream stream = {}) const;

    /// The same for a routing made elsewhere: topk_ids [T, k] int32 global ids (negative ones, and
    /// without expert parallelism those of other ranks, add nothing), topk_weights [T, k] float32,
    /// k = config.routing.top_k.
    void forward_routed(const TensorView& hidden_states, const TensorView& topk_ids,
                        const TensorView& topk_weights, const TensorView& output,
                        Workspace& workspace, Stream stream = {}) const;

    const MoEConfig& config() const { return config_; }

private:
    /// What sort_by_expert writes.
    struct SortedSlots {
        TensorView slots, slot_to_row, expert_offsets;
    };

    /// Calls `body`. Across ranks, an exception also ends the other ranks' calls.
    template <typename Body>
    void guarded(Body&& body) const;
    void check_tensors(const TensorView& hidden_states, const TensorView& output) const;
    void check_routes(const TensorView& topk_ids, const TensorView& topk_weights,
                      const TensorView& output) const;
    void run(const TensorView& hidden_states, const TensorView& router_logits,
             const TensorView& output, Workspace& workspace, Stream stream) const;
    SortedSlots take_sorted(int64_t num_slots, Workspace& workspace) const;
    void run_across_ranks(const TensorView& hidden_states, const TensorView& topk_ids,
                          const TensorView& topk_weights, const TensorView& output,
                          Workspace& workspace, Stream stream) const;
    void run_experts(const TensorView& hidden_states, const SortedSlots& sorted,
                     const TensorView& topk_weights, const TensorView& output, Workspace& workspace,
                     Stream stream) const;
    /// The shared expert's output [T, H] and, with a gate, its scale [T]; absent without one.
    TensorView run_shared(const TensorView& hidden_states, TensorView& shared_scale,
                          Workspace& workspace, Stream stream) const;

    MoEConfig config_;
    MoEWeights weights_;
    ExpertParallel* ranks_ = nullptr;
    ExpertParallelConfig how_;
};

}  // namespace moecore
