#include "moecore/decoder_layer.hpp"

#include <memory>
#include <mutex>

#include "bindings/moe_layer.hpp"
#include "bindings/named_tensors.hpp"

namespace py = pybind11;

namespace moecore::bindings {
namespace {

QkNorm qk_norm_named(const std::string& name) {
    return enum_named<QkNorm>("qk_norm", name,
                              {{"none", QkNorm::kNone},
                               {"per_head", QkNorm::kPerHead},
                               {"full_width", QkNorm::kFullWidth}});
}

/// Activations with references to their tensors, and the scratch memory of the layers that use
/// them. One call at a time; concurrent callers wait.
class PyActivations {
public:
    explicit PyActivations(py::dict tensors)
        : tensors_(kOp, std::move(tensors)),
          activations_(views()),
          workspace_(activations_.device(), 0) {}

    /// Calls fn(activations, workspace, stream) without the GIL.
    template <typename Fn>
    void run(Fn&& fn) {
        const Stream stream = current_stream();
        py::gil_scoped_release release;
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
    PyDecoderLayer(const DecoderConfig& config, py::dict weights)
        : weights_(kOp, std::move(weights)), layer_(config, views()) {}

    void before_attention(PyActivations& activations, py::handle positions, py::handle cos_sin,
                          bool is_first) const {
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
        const py::object moe = weights_.object("moe");
        if (!moe.is_none()) views.moe = &moe_layer_of(moe).layer();
        return views;
    }

    static const PyMoELayer& moe_layer_of(py::handle object) {
        if (!py::isinstance<PyMoELayer>(object))
            throw py::type_error(concat(kOp, ": moe must be a MoELayer of moecore._core, got ",
                                        Py_TYPE(object.ptr())->tp_name));
        return object.cast<const PyMoELayer&>();
    }

    NamedTensors weights_;
    DecoderLayer layer_;
};

}  // namespace

void bind_decoder_layer(py::module_& module) {
    py::class_<PyActivations>(module, "Activations").def(py::init([](const py::kwargs& tensors) {
        return std::make_unique<PyActivations>(py::dict(tensors));
    }));

    py::class_<PyDecoderLayer>(module, "DecoderLayer")
        .def(py::init([](int64_t hidden_size, int64_t num_heads, int64_t num_kv_heads,
                         int64_t head_dim, int64_t intermediate_size, float rms_norm_eps,
                         const std::string& qk_norm, const std::string& dtype, py::dict weights) {
                 const DecoderConfig config{
                     .hidden_size = hidden_size,
                     .num_heads = num_heads,
                     .num_kv_heads = num_kv_heads,
                     .head_dim = head_dim,
                     .intermediate_size = intermediate_size,
                     .rms_norm_eps = rms_norm_eps,
                     .qk_norm = qk_norm_named(qk_norm),
                     .dtype = dtype_named(dtype),
                 };
                 return std::make_unique<PyDecoderLayer>(config, std::move(weights));
             }),
             py::kw_only(), py::arg("hidden_size"), py::arg("num_heads"), py::arg("num_kv_heads"),
             py::arg("head_dim"), py::arg("intermediate_size"), py::arg("rms_norm_eps"),
             py::arg("qk_norm"), py::arg("dtype"), py::arg("weights"))
        .def("before_attention", &PyDecoderLayer::before_attention)
        .def("project_qkv", &PyDecoderLayer::project_qkv)
        .def("after_attention", &PyDecoderLayer::after_attention);
}

}  // namespace moecore::bindings
