#include "bindings/decoder_layer.hpp"

#include <memory>

namespace py = pybind11;

namespace moecore::bindings {
namespace {

QkNorm qk_norm_named(const std::string& name) {
    return enum_named<QkNorm>("qk_norm", name,
                              {{"none", QkNorm::kNone},
                               {"per_head", QkNorm::kPerHead},
                               {"full_width", QkNorm::kFullWidth}});
}

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
