#include "runtime/weight_rules.hpp"

namespace moecore {

void WeightRules::matrix(const char* name, const GroupedGemmWeights& weights,
                         std::initializer_list<int64_t> sizes, bool gated) const {
    check.that(weights.defined(), name, " must be given, got none");
    if (weights.packed == nullptr) {
        check.shape(name, weights.plain, sizes);
        check.dtype(name, weights.plain, {dtype});
        check.device(name, weights.plain, device);
        check.matrix_strides(name, weights.plain);
        return;
    }
    // The packed form as a tensor of its logical sizes, for the same checks and messages.
    const PackedWeights& packed = *weights.packed;
    void* data = const_cast<void*>(packed.data());
    const TensorView logical =
        sizes.size() == 2 && packed.num_groups() == 1
            ? TensorView(data, packed.dtype(), {packed.n(), packed.k_dim()}, packed.device())
            : TensorView(data, packed.dtype(), {packed.num_groups(), packed.n(), packed.k_dim()},
                         packed.device());
    check.shape(name, logical, sizes);
    check.dtype(name, logical, {dtype});
    check.device(name, logical, device);
    check.that(packed.gated() == gated, name, " must be packed with gated = ", gated,
               ", got gated = ", packed.gated());
}

void WeightRules::vector(const char* name, const TensorView& view,
                         std::initializer_list<int64_t> sizes) const {
    check.that(view.defined(), name, " must be given, got none");
    check.shape(name, view, sizes);
    if (dtype == DType::kFloat32)
        check.dtype(name, view, {DType::kFloat32});
    else
        check.dtype(name, view, {DType::kFloat32, dtype});
    check.rows_contiguous(name, view);
    check.device(name, view, device);
}

}  // namespace moecore
