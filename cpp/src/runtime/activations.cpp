#include "moecore/activations.hpp"

#include "ops/check.hpp"

namespace moecore {

Activations::Activations(const ActivationTensors& tensors) : tensors_(tensors) {
    const Check check("Activations");
    const TensorView& residual = tensors.residual;
    check.shape("residual", residual, {Check::kAny, Check::kAny});
    check.dtype("residual", residual, {DType::kFloat32, DType::kBFloat16});
    const int64_t num_tokens = residual.shape[0];
    const int64_t width = residual.shape[1];

    struct Named {
        const char* name;
        const TensorView& view;
        int64_t width;
        bool is_optional = false;
    };
    const Named all[] = {
        {"residual", residual, width},
        {"normed", tensors.normed, width},
        {"delta", tensors.delta, width},
        {"qkv", tensors.qkv, Check::kAny},
        {"attended", tensors.attended, Check::kAny},
        {"router_logits", tensors.router_logits, Check::kAny, true},
        {"inner", tensors.inner, Check::kAny, true},
    };
    for (const Named& one : all) {
        if (one.is_optional && !one.view.defined()) continue;
        check.shape(one.name, one.view, {num_tokens, one.width});
        if (&one.view != &tensors.router_logits || one.view.dtype != DType::kFloat32)
            check.dtype(one.name, one.view, {residual.dtype});
        check.rows_contiguous(one.name, one.view);
        check.device(one.name, one.view, residual.device);
        for (const Named* other = all; other != &one; ++other)
            check.no_overlap(one.name, one.view, other->name, other->view);
    }
}

}  // namespace moecore
