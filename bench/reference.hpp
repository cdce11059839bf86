#pragma once

#include <functional>

#include "harness.hpp"
#include "moecore/topk_routing.hpp"

namespace moecore::bench {

/// One expert's random weights: the same for the same arguments.
struct ExpertWeights {
    OwnedTensor gate, up, down;  ///< [I, H], [I, H], [H, I] bfloat16
};
ExpertWeights make_expert(const LayerShape& shape, uint64_t layer, int expert);

/// True if `output` is what a layer with these experts must give for its first and its last token,
/// by plain float64 loops: a relative error below 1 % each, which covers the bfloat16 rounding of
/// the inner layer, of the rows and of the output (2^-9 each) and nothing else.
bool check_layer(const LayerShape& shape, const std::function<ExpertWeights(int)>& expert,
                 const TensorView& hidden, const TensorView& logits, const TensorView& output);

/// True if `output` is what grouped_gemm must give, by plain float64 loops over every 7th column of
/// the first, the middle and the last row: an error below 1 % of the row's norm, which covers
/// bfloat16's rounding and nothing else. weights: plain [G, N, K]; gated means SwiGLU, gate first.
bool check_grouped_gemm(const TensorView& input, const TensorView& weights,
                        const TensorView& expert_offsets, const TensorView& sorted_slots,
                        int slots_per_token, bool gated, const TensorView& output);

/// True if every token's ids and weights are what the formula in topk_routing.hpp gives in float64:
/// weights to 1e-5, and another id only where its choice is within 1e-6.
bool check_routing(const RoutingConfig& config, const TensorView& logits, const TensorView& bias,
                   const TensorView& topk_ids, const TensorView& topk_weights);

}  // namespace moecore::bench
