#pragma once

#include "moecore/kernels/norm_and_rotate.hpp"
#include "moecore/kernels/write_kv_cache.hpp"

namespace moecore {

/// What every rotate_and_cache kernel takes. Built and checked by ops/rotate_and_cache.cpp. The key
/// heads of both parts are the same memory; value's follow them.
struct RotateAndCacheArgs {
    NormAndRotateArgs heads;  ///< without has_norm, only `rotary` and query's num_heads are set
    WriteKvCacheArgs store;
    bool has_norm;
};

namespace cpu {
void rotate_and_cache(const RotateAndCacheArgs& args);
}
namespace cuda {
/// Leaves key heads as they are. What the batch places outside the cache is not written.
void rotate_and_cache(const RotateAndCacheArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
