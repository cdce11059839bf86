#pragma once

#include <cstdint>

#include "moecore/dtype.hpp"
#include "moecore/rotary_embedding.hpp"
#include "moecore/stream.hpp"

namespace moecore {

/// What every rotary_embedding kernel takes. Built and checked by ops/rotary_embedding.cpp.
struct RotaryEmbeddingArgs {
    void* x;                   ///< [T, n, >= rotary_dim] of `dtype`, in and out
    const int32_t* positions;  ///< [T]
    const float* cos_sin;      ///< [P, rotary_dim]
    int64_t token_stride;      ///< elements between tokens of x
    int64_t head_stride;       ///< elements between heads of x
    int64_t cos_sin_stride;
    int64_t num_tokens;     ///< T >= 0
    int64_t num_heads;      ///< n >= 0
    int64_t num_positions;  ///< P
    int64_t rotary_dim;     ///< even, >= 2
    RotaryPairs pairs;
    DType dtype;
};

namespace cpu {
void rotary_embedding(const RotaryEmbeddingArgs& args);
}
namespace cuda {
void rotary_embedding(const RotaryEmbeddingArgs& args, Stream stream);
}

}  // namespace moecore
