#pragma once

#include "moecore/kernels/rms_norm.hpp"
#include "moecore/kernels/rotary_embedding.hpp"

namespace moecore {

/// What every norm_and_rotate kernel takes. Built and checked by ops/norm_and_rotate.cpp. The heads
/// of `query` and then those of `key` are the heads of `rotary`; all in place.
struct NormAndRotateArgs {
    RmsNormArgs query, key;
    RotaryEmbeddingArgs rotary;
};

namespace cpu {
void norm_and_rotate(const NormAndRotateArgs& args);
}
namespace cuda {
void norm_and_rotate(const NormAndRotateArgs& args, Stream stream);
}

}  // namespace moecore
