#pragma once

#include "moecore/tensor_view.hpp"

namespace moecore {

/// Borrowed tensors of one forward pass over T tokens, which every layer uses anew. H, Hq, Hk, D, E
/// and I are the model's, see DecoderConfig. Rows are contiguous.
struct ActivationTensors {
    TensorView residual;       ///< [T, H] float32 or bfloat16, as all the others
    TensorView normed;         ///< [T, H]
    TensorView delta;          ///< [T, H]: what a block adds to residual
    TensorView qkv;            ///< [T, (Hq + 2 Hk) D]: query, key and value heads
    TensorView attended;       ///< [T, Hq D]: attention's output
    TensorView router_logits;  ///< [T, E], may also be float32; for layers with experts, or absent
    TensorView inner;          ///< [T, I]; for layers with a dense MLP, or absent
};

/// ActivationTensors that fit together: one T, dtype and device, and no byte in two of them.
class Activations {
public:
    /// Throws InvalidArgument if a tensor is not as above; the message names it.
    explicit Activations(const ActivationTensors& tensors);

    const ActivationTensors& tensors() const { return tensors_; }
    int64_t num_tokens() const { return tensors_.residual.shape[0]; }
    Device device() const { return tensors_.residual.device; }

private:
    ActivationTensors tensors_;
};

}  // namespace moecore
