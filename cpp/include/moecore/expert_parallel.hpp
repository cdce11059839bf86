#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "moecore/dispatcher.hpp"
#include "moecore/moe_layer.hpp"
#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"
#include "moecore/transport.hpp"

namespace moecore {

/// The part of a MoELayer that spans ranks: sends tokens to the ranks that own their experts, runs
/// this rank's experts on what arrives, and sends the results back, in a pipeline over groups of
/// local experts. One per rank, shared by all its layers: it owns scratch memory that grows to the
/// largest call, and what carries communication beside the computation.
///
/// Every rank makes the same calls in the same order, one at a time. If a call throws, the group is
/// aborted: all ranks throw.
class ExpertParallel {
public:
    /// `transport` must outlive this.
    explicit ExpertParallel(Transport& transport);
    ~ExpertParallel();
    ExpertParallel(const ExpertParallel&) = delete;
    ExpertParallel& operator=(const ExpertParallel&) = delete;

    /// One layer's work for this rank's T tokens, after routing and before nothing: writes output.
    struct Call {
        const MoEConfig& config;
        const MoEWeights& weights;
        const ExpertParallelConfig& how;
        TensorView hidden_states;  ///< [T, H]
        TensorView topk_ids;       ///< [T, k] int32
        TensorView topk_weights;   ///< [T, k] float32
        TensorView output;         ///< [T, H]
        /// Computes the shared expert: its output [T, H] or an absent view, and its scale.
        std::function<TensorView(TensorView& shared_scale)> run_shared;
    };
    /// Throws TransportError if a rank fails, is late, or has a layer of other sizes.
    void forward(const Call& call, Stream stream);

    Transport& transport() { return transport_; }

private:
    struct State;
    Transport& transport_;
    std::unique_ptr<State> state_;
};

}  // namespace moecore
