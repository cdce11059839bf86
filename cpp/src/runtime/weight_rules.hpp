#pragma once

#include <initializer_list>

#include "moecore/grouped_gemm.hpp"
#include "ops/check.hpp"

namespace moecore {

/// The device of either kind of weights.
inline Device device_of(const GroupedGemmWeights& weights) {
    return weights.packed ? weights.packed->device() : weights.plain.device;
}

/// What every weight of a layer must agree with.
struct WeightRules {
    const Check& check;
    DType dtype;
    Device device;

    /// Either kind of weights: [n, k] for a single matrix, [groups, n, k] otherwise.
    void matrix(const char* name, const GroupedGemmWeights& weights,
                std::initializer_list<int64_t> sizes, bool gated) const;

    /// A tensor of float32 or the layer's dtype, such as a bias or a norm's weight.
    void vector(const char* name, const TensorView& view,
                std::initializer_list<int64_t> sizes) const;

    /// The same, or absent.
    void optional_vector(const char* name, const TensorView& view,
                         std::initializer_list<int64_t> sizes) const {
        if (view.defined()) vector(name, view, sizes);
    }
};

}  // namespace moecore
