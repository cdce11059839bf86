#pragma once

#include "harness.hpp"

namespace moecore::bench {

/// One expert's random weights: the same for the same arguments.
struct ExpertWeights {
    OwnedTensor gate, up, down;  ///< [I, H], [I, H], [H, I] bfloat16
};
ExpertWeights make_expert(const LayerShape& shape, uint64_t layer, int expert);

/// True if `output` is what layer `layer` must give for its first and its last token, by plain
/// float64 loops: a relative error below 1 % each, which covers the bfloat16 rounding of the inner
/// layer, of the rows and of the output (2^-9 each) and nothing else.
bool check_layer(const LayerShape& shape, uint64_t layer, const TensorView& hidden,
                 const TensorView& logits, const TensorView& output);

}  // namespace moecore::bench
