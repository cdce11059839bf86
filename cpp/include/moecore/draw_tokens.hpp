#pragma once

#include <cstdint>
#include <span>

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// How one row's token is chosen.
struct DrawParams {
    float temperature = 0.0f;  ///< finite, >= 0; 0 takes the first of the largest logits
    float min_p = 0.0f;        ///< in [0, 1]
    double noise = 0.0;        ///< in [0, 1)
};

struct DrawnToken {
    int64_t token_id;  ///< 0, and without a meaning, where maximum is not finite
    float maximum;     ///< the row's largest logit; NaN if it holds one
};

/// Chooses one token of each row, and returns when that is done. Token i has the integer weight
///
///     w = exp((logits[i] - maximum) / temperature)
///     floor(2^40 * w), or 0 if w < min_p
///
/// and the token is chosen into whose share of the running sum of weights the noise falls. Integers
/// add up to one number in any order: a row's token depends on that row only, and is the same on
/// every device.
///
/// logits  [N, V] float32, rows contiguous, V in [1, 2^22], N < 2^16 on CUDA; params and tokens
///         hold N each, in the host's memory
/// Throws InvalidArgument if a shape, dtype, stride or value is not as above.
void draw_tokens(const TensorView& logits, std::span<const DrawParams> params,
                 std::span<DrawnToken> tokens, Stream stream = {});

}  // namespace moecore
