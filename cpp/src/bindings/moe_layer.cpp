#include "bindings/moe_layer.hpp"

#include <memory>

namespace py = pybind11;

namespace moecore::bindings {
namespace {
constexpr const char* kOp = "MoELayer";
}

PyMoELayer::PyMoELayer(const MoEConfig& config, py::dict weights, py::object transport,
                       const ExpertParallelConfig& how)
    : weights_(kOp, std::move(weights)),
      transport_(std::move(transport)),
      layer_(make_layer(config, how)),
      workspace_(device_, 0) {}

MoELayer PyMoELayer::make_layer(const MoEConfig& config, const ExpertParallelConfig& how) {
    if (transport_.is_none()) return {config, views()};
    if (!py::isinstance<PyTransport>(transport_))
        throw py::type_error(concat(kOp, ": transport must be a Transport of moecore._core, got ",
                                    Py_TYPE(transport_.ptr())->tp_name));
    return {config, views(), transport_.cast<PyTransport&>().ranks(), how};
}

void PyMoELayer::forward(py::handle hidden_states, py::handle router_logits, py::handle output) {
    const TensorArg x(hidden_states, kOp, "hidden_states");
    const TensorArg logits(router_logits, kOp, "router_logits");
    const TensorArg out(output, kOp, "output");
    run(x, out, [&] { layer_.forward(x, logits, out, workspace_, x.current_stream()); });
}

void PyMoELayer::forward_routed(py::handle hidden_states, py::handle topk_ids,
                                py::handle topk_weights, py::handle output) {
    const TensorArg x(hidden_states, kOp, "hidden_states");
    const TensorArg ids(topk_ids, kOp, "topk_ids");
    const TensorArg weights(topk_weights, kOp, "topk_weights");
    const TensorArg out(output, kOp, "output");
    run(x, out,
        [&] { layer_.forward_routed(x, ids, weights, out, workspace_, x.current_stream()); });
}

template <typename Fn>
void PyMoELayer::run(const TensorView& hidden_states, const TensorView& output, Fn&& fn) {
    py::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    layer_.check_call(hidden_states, output);
    workspace_.grow(layer_.workspace_bytes(hidden_states.shape[0]));
    fn();
}

MoEWeights PyMoELayer::views() {
    MoEWeights views;
    views.gate_up = weights_.weights("gate_up");
    views.down = weights_.weights("down");
    views.gate_up_bias = weights_.tensor("gate_up_bias");
    views.down_bias = weights_.tensor("down_bias");
    views.selection_bias = weights_.tensor("selection_bias");
    views.shared_gate_up = weights_.weights("shared_gate_up");
    views.shared_down = weights_.weights("shared_down");
    views.shared_gate = weights_.tensor("shared_gate");
    device_ = views.gate_up.packed ? views.gate_up.packed->device() : views.gate_up.plain.device;
    return views;
}

void bind_moe_layer(py::module_& module) {
    py::class_<PyMoELayer>(module, "MoELayer")
        .def(py::init([](int64_t hidden_size, int64_t intermediate_size, int num_experts,
                         int first_expert, int num_local_experts, const RoutingConfig& routing,
                         const GroupedGemmConfig& activation, int64_t shared_intermediate_size,
                         const std::string& dtype, py::dict weights, py::object transport,
                         const std::string& combine, const std::string& schedule, int num_groups,
                         int64_t fixed_tokens) {
                 MoEConfig config;
                 config.hidden_size = hidden_size;
                 config.intermediate_size = intermediate_size;
                 config.num_experts = num_experts;
                 config.first_expert = first_expert;
                 config.num_local_experts = num_local_experts;
                 config.routing = routing;
                 config.activation = activation;
                 config.shared_intermediate_size = shared_intermediate_size;
                 config.dtype = dtype_named(dtype);
                 const ExpertParallelConfig how{
                     .combine = enum_named<CombineMode>(
                         "MoELayer: combine", combine,
                         {{"exact", CombineMode::kExact}, {"fast", CombineMode::kFast}}),
                     .schedule = enum_named<Schedule>("MoELayer: schedule", schedule,
                                                      {{"auto", Schedule::kAuto},
                                                       {"all_to_all", Schedule::kAllToAll},
                                                       {"all_gather", Schedule::kAllGather}}),
                     .num_groups = num_groups,
                     .fixed_tokens = fixed_tokens};
                 return std::make_unique<PyMoELayer>(config, std::move(weights),
                                                     std::move(transport), how);
             }),
             py::kw_only(), py::arg("hidden_size"), py::arg("intermediate_size"),
             py::arg("num_experts"), py::arg("first_expert"), py::arg("num_local_experts"),
             py::arg("routing"), py::arg("activation"), py::arg("shared_intermediate_size"),
             py::arg("dtype"), py::arg("weights"), py::arg("transport") = py::none(),
             py::arg("combine") = "exact", py::arg("schedule") = "auto", py::arg("num_groups") = 0,
             py::arg("fixed_tokens") = 0)
        .def("forward", &PyMoELayer::forward)
        .def("forward_routed", &PyMoELayer::forward_routed);
}

}  // namespace moecore::bindings
