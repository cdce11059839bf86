#pragma once

#include <initializer_list>

#include "moecore/workspace.hpp"

namespace moecore {

/// A tensor wanted from a workspace: [rows, width], or [rows] if width is 0.
struct Wanted {
    TensorView* view;
    DType dtype;
    int64_t rows;
    int64_t width = 0;
};

/// Grows `workspace` to hold all of them at once, and takes them.
inline void take_all(Workspace& workspace, std::initializer_list<Wanted> wanted) {
    size_t bytes = 0;
    for (const Wanted& one : wanted)
        bytes += one.width == 0 ? Workspace::bytes_for(one.dtype, {one.rows})
                                : Workspace::bytes_for(one.dtype, {one.rows, one.width});
    workspace.grow(bytes);
    for (const Wanted& one : wanted)
        *one.view = one.width == 0 ? workspace.take(one.dtype, {one.rows})
                                   : workspace.take(one.dtype, {one.rows, one.width});
}

/// Rows begin .. begin + count - 1 of a contiguous [N, K], or elements of a [N].
inline TensorView slice(const TensorView& view, int64_t begin, int64_t count) {
    TensorView result = view;
    result.data = static_cast<char*>(view.data) +
                  static_cast<size_t>(begin * view.strides[0]) * size_of(view.dtype);
    result.shape[0] = count;
    return result;
}

}  // namespace moecore
