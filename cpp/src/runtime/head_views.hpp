#pragma once

#include "moecore/tensor_view.hpp"

namespace moecore {

/// `count` heads of every token, from head `first` of `rows` [T, n * head_dim] on, as
/// [T, count, head_dim].
inline TensorView heads_of(const TensorView& rows, int64_t first, int64_t count, int64_t head_dim) {
    TensorView view(rows.as<char>() + static_cast<size_t>(first * head_dim) * size_of(rows.dtype),
                    rows.dtype, {rows.shape[0], count, head_dim}, rows.device);
    view.strides[0] = rows.strides[0];
    return view;
}

}  // namespace moecore
