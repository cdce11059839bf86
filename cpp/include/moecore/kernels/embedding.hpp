#pragma once

#include <cstdint>

#include "moecore/dtype.hpp"
#include "moecore/stream.hpp"

namespace moecore {

/// What every embedding kernel takes. Built and checked by ops/embedding.cpp.
struct EmbeddingArgs {
    const void* ids;  ///< [T] of `ids_dtype`
    DType ids_dtype;
    const void* weight;  ///< [N, K] of `dtype`, or packed
    bool is_packed;
    int64_t weight_stride;  ///< elements between rows, if not packed
    void* output;           ///< [T, K] of `dtype`, out
    int64_t output_stride;
    int64_t num_tokens;  ///< T >= 0
    int64_t num_rows;    ///< N
    int64_t width;       ///< K >= 1
    DType dtype;

    /// On the host. REQUIRES: 0 <= token < num_tokens.
    int64_t id(int64_t token) const {
        return ids_dtype == DType::kInt32 ? static_cast<const int32_t*>(ids)[token]
                                          : static_cast<const int64_t*>(ids)[token];
    }
};

namespace cpu {
void embedding(const EmbeddingArgs& args);
}
namespace cuda {
void embedding(const EmbeddingArgs& args, Stream stream);
}

}  // namespace moecore
