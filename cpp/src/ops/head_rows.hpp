#pragma once

#include "moecore/tensor_view.hpp"

namespace moecore {

/// A tensor [T, N] or [T, n, N] as n rows of N elements for each token.
struct HeadRows {
    int64_t num_tokens, num_heads, width;
    int64_t token_stride, head_stride;  ///< in elements
};

/// REQUIRES: `view` has 2 or 3 dimensions.
inline HeadRows head_rows(const TensorView& view) {
    const bool has_heads = view.rank == 3;
    return {view.shape[0], has_heads ? view.shape[1] : 1, view.shape[view.rank - 1],
            view.strides[0], has_heads ? view.strides[1] : 0};
}

/// [T, n, N] as the matrix [T, n * N] where its heads lie side by side: overlap() then tells column
/// slices of one buffer apart. Any other view as it is.
inline TensorView as_matrix(const TensorView& view) {
    if (view.rank != 3 || (view.shape[1] > 1 && view.strides[1] != view.shape[2])) return view;
    TensorView matrix = view;
    matrix.rank = 2;
    matrix.shape[1] = view.shape[1] * view.shape[2];
    matrix.strides[1] = 1;
    return matrix;
}

/// Both views are the same elements of the same memory.
inline bool is_same_view(const TensorView& a, const TensorView& b) {
    return a.data == b.data && a.dtype == b.dtype && a.shape == b.shape && a.strides == b.strides;
}

}  // namespace moecore
