#pragma once

#include <initializer_list>

#include "moecore/error.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// The checks every op makes before it uses a pointer. Each throws InvalidArgument with the op, the
/// argument, the rule and the value. Absent tensors must be tested for by the caller.
class Check {
public:
    explicit Check(const char* op) : op_(op) {}

    template <typename... Parts>
    void that(bool condition, const Parts&... parts) const {
        if (!condition) throw InvalidArgument(concat(op_, ": ", parts...));
    }

    void dtype(const char* name, const TensorView& view,
               std::initializer_list<DType> allowed) const;

    /// Exact sizes; kAny matches any.
    static constexpr int64_t kAny = -1;
    void shape(const char* name, const TensorView& view,
               std::initializer_list<int64_t> sizes) const;

    /// C order without gaps.
    void contiguous(const char* name, const TensorView& view) const;

    /// The last dimension contiguous; earlier strides positive and large enough that no two
    /// elements share memory.
    void rows_contiguous(const char* name, const TensorView& view) const;

    /// For weights [..., N, K]: N or K contiguous (or of size 1), no negative stride.
    void matrix_strides(const char* name, const TensorView& view) const;

    void device(const char* name, const TensorView& view, Device expected) const;

    /// `output` and `input` share no byte.
    void no_overlap(const char* output_name, const TensorView& output, const char* input_name,
                    const TensorView& input) const;

private:
    const char* op_;
};

/// True if the two views share a byte.
bool overlap(const TensorView& a, const TensorView& b);

}  // namespace moecore
