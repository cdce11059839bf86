#pragma once

#include "moecore/decoder_layer.hpp"

#include <mutex>

#include "bindings/moe_layer.hpp"
#include "bindings/named_tensors.hpp"

namespace moecore::bindings {

/// Activations with references to their tensors, and the scratch memory of the layers that use
/// them. One call at a time; concurrent callers wait.
class PyActivations {
public:
    explicit PyActivations(pybind11::dict tensors)
        : tensors_(kOp, std::move(tensors)),
          activations_(views()),
          workspace_(activations_.device(), 0) {}

    /// Calls fn(activations, workspace, stream) without the GIL.
    template <typename Fn>
    void run(Fn&& fn) {
        const Stream stream = current_stream();
        pybind11::gil_scoped_release release;
        const std::lock_guard lock(mutex_);
        fn(activations_, workspace_, stream);
    }

private:
    static constexpr const char* kOp = "Activations";

    ActivationTensors views() {
        return {
            .residual = tensors_.tensor("residual"),
            .normed = tensors_.tensor("normed"),
            .delta = tensors_.tensor("delta"),
            .qkv = tensors_.tensor("qkv"),
            .attended = tensors_.tensor("attended"),
            .router_logits = tensors_.tensor("router_logits"),
            .inner = tensors_.tensor("inner"),
        };
    }

    Stream current_stream() const {
        if (activations_.device().type == DeviceType::kCpu) return {};
        return TensorArg(tensors_.object("residual"), kOp, "residual").current_stream();
    }

    NamedTensors tensors_;
    Activations activations_;
    Workspace workspace_;
    std::mutex mutex_;
};

/// A DecoderLayer with references to its weights.
class PyDecoderLayer {
public:
    PyDecoderLayer(const DecoderConfig& config, pybind11::dict weights)
        : weights_(kOp, std::move(weights)), layer_(config, views()) {}

    void before_attention(PyActivations& activations, pybind11::handle positions,
                          pybind11::handle cos_sin, bool is_first) const {
        const TensorArg ids(positions, kOp, "positions");
        const TensorArg table(cos_sin, kOp, "cos_sin");
        activations.run([&](const Activations& a, Workspace&, Stream stream) {
            layer_.before_attention(a, ids, table, is_first, stream);
        });
    }

    void project_qkv(PyActivations& activations, bool is_first) const {
        activations.run([&](const Activations& a, Workspace&, Stream stream) {
            layer_.project_qkv(a, is_first, stream);
        });
    }

    void after_attention(PyActivations& activations) const {
        activations.run([&](const Activations& a, Workspace& workspace, Stream stream) {
            workspace.grow(layer_.workspace_bytes(a.num_tokens()));
            layer_.after_attention(a, workspace, stream);
        });
    }

    /// Valid while this lives.
    const DecoderLayer& layer() const { return layer_; }

private:
    static constexpr const char* kOp = "DecoderLayer";

    DecoderWeights views() {
        DecoderWeights views;
        views.input_norm = weights_.tensor("input_norm");
        views.post_norm = weights_.tensor("post_norm");
        views.qkv = weights_.weights("qkv");
        views.qkv_bias = weights_.tensor("qkv_bias");
        views.output = weights_.weights("output");
        views.output_bias = weights_.tensor("output_bias");
        views.q_norm = weights_.tensor("q_norm");
        views.k_norm = weights_.tensor("k_norm");
        views.router = weights_.weights("router");
        views.gate_up = weights_.weights("gate_up");
        views.down = weights_.weights("down");
        const pybind11::object moe = weights_.object("moe");
        if (!moe.is_none()) views.moe = &moe_layer_of(moe).layer();
        return views;
    }

    static const PyMoELayer& moe_layer_of(pybind11::handle object) {
        if (!pybind11::isinstance<PyMoELayer>(object))
            throw pybind11::type_error(concat(kOp,
                                              ": moe must be a MoELayer of moecore._core, got ",
                                              Py_TYPE(object.ptr())->tp_name));
        return object.cast<const PyMoELayer&>();
    }

    NamedTensors weights_;
    DecoderLayer layer_;
};

}  // namespace moecore::bindings
