#pragma once

#include <cstdint>

#include "moecore/draw_tokens.hpp"

namespace moecore {

/// Checked arguments of draw_tokens. N rows.
struct DrawTokensArgs {
    const float* logits;
    int64_t logits_stride;
    int64_t vocab_size;
    const DrawParams* params;  ///< [N]
    DrawnToken* tokens;        ///< [N]
    int64_t num_rows;
};

inline constexpr int64_t kMaxDrawnVocab = int64_t{1} << 22;
inline constexpr int64_t kMaxDrawnRows = 65535;  ///< on CUDA: the height of a grid

namespace cpu {
void draw_tokens(const DrawTokensArgs& args);
}
namespace cuda {
/// `params` and `tokens` are the host's; waits for the stream. num_rows < 2^16.
void draw_tokens(const DrawTokensArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
