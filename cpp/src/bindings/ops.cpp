#include "bindings/ops.hpp"

#include <pybind11/stl.h>

#include <functional>
#include <tuple>
#include <vector>

#include "moecore/combine.hpp"
#include "moecore/embedding.hpp"
#include "moecore/error.hpp"
#include "moecore/sort_by_expert.hpp"

namespace py = pybind11;

namespace moecore::bindings {
namespace {

/// FileReadError with its attributes; python/moecore/checkpoint.py adds tensor and file.
void register_file_read_error(py::module_& module) {
    static PyObject* type =
        PyErr_NewException("moecore._core.FileReadError", PyExc_RuntimeError, nullptr);
    module.attr("FileReadError") = py::handle(type);
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const FileReadError& error) {
            const py::object value = py::handle(type)(error.what());
            value.attr("matrix") = error.matrix();
            value.attr("found") = error.found();
            value.attr("error_number") = error.error_number();
            PyErr_SetObject(type, value.ptr());
        }
    });
}

using MatrixTuple = std::tuple<int, int64_t, int64_t, int64_t>;
using PackingTuple =
    std::tuple<std::reference_wrapper<PackedWeights>, int64_t, std::vector<MatrixTuple>>;

void pack_files(const std::vector<PackingTuple>& packings, int num_threads) {
    py::gil_scoped_release release;  // the caller's list holds the weights
    std::vector<FilePacking> all;
    for (const auto& [weights, group, matrices] : packings) {
        all.push_back({&weights.get(), group, {}});
        for (const auto& [descriptor, offset, num_rows, k_dim] : matrices)
            all.back().matrices.push_back({descriptor, offset, num_rows, k_dim});
    }
    PackedWeights::pack_files(all, num_threads);
}

void bind_packed_weights(py::module_& module) {
    register_file_read_error(module);
    py::class_<PackedWeights>(module, "PackedWeights",
                              "Expert weights in the order that the CPU kernels read best.")
        .def(py::init([](const std::string& dtype, int64_t num_groups, int64_t n, int64_t k_dim,
                         bool gated) {
                 return new PackedWeights(dtype_named(dtype), num_groups, n, k_dim, gated);
             }),
             py::arg("dtype"), py::arg("num_groups"), py::arg("n"), py::arg("k_dim"),
             py::arg("gated"))
        .def(
            "pack",
            [](PackedWeights& self, int64_t group, py::handle weights) {
                const TensorArg view(weights, "PackedWeights", "weights");
                py::gil_scoped_release release;
                self.pack(group, view);
            },
            py::arg("group"), py::arg("weights"),
            "Pack the matrix [n, k_dim] of one group (not gated).")
        .def(
            "pack_gated",
            [](PackedWeights& self, int64_t group, py::handle gate, py::handle up) {
                const TensorArg gate_view(gate, "PackedWeights", "gate");
                const TensorArg up_view(up, "PackedWeights", "up");
                py::gil_scoped_release release;
                self.pack_gated(group, gate_view, up_view);
            },
            py::arg("group"), py::arg("gate"), py::arg("up"),
            "Pack gate [n / 2, k_dim] and up [n / 2, k_dim] of one group.")
        .def_static("pack_files", &pack_files, py::arg("packings"), py::arg("num_threads"),
                    "Pack the rows of groups out of files: (weights, group, [(descriptor, offset, "
                    "rows, k_dim), ...]) for each.")
        .def(
            "rows",
            [](const PackedWeights& self, py::handle ids, py::handle out) {
                const TensorArg ids_view(ids, "embedding", "ids");
                const TensorArg output(out, "embedding", "output");
                py::gil_scoped_release release;
                embedding(ids_view, self, output);
            },
            py::arg("ids"), py::arg("out"),
            "Copy rows ids [T] of the matrix (one group, not gated) to out [T, k_dim].")
        .def_property_readonly("dtype",
                               [](const PackedWeights& self) { return name_of(self.dtype()); })
        .def_property_readonly("shape",
                               [](const PackedWeights& self) {
                                   return py::make_tuple(self.num_groups(), self.n(), self.k_dim());
                               })
        .def_property_readonly("gated", &PackedWeights::gated)
        .def_property_readonly("nbytes", &PackedWeights::size_bytes);
}

}  // namespace

ScoreFunction score_function_named(const std::string& name) {
    return enum_named<ScoreFunction>("score_function", name,
                                     {{"softmax", ScoreFunction::kSoftmax},
                                      {"sigmoid", ScoreFunction::kSigmoid},
                                      {"sqrtsoftplus", ScoreFunction::kSqrtSoftplus},
                                      {"raw_logits", ScoreFunction::kRawLogits}});
}

GroupLimit group_limit_named(const std::string& name) {
    return enum_named<GroupLimit>("group_limit", name,
                                  {{"none", GroupLimit::kNone},
                                   {"max", GroupLimit::kMax},
                                   {"top2_sum", GroupLimit::kTop2Sum}});
}

Activation activation_named(const std::string& name) {
    return enum_named<Activation>("activation", name,
                                  {{"none", Activation::kNone},
                                   {"swiglu", Activation::kSwiglu},
                                   {"clamped_swiglu", Activation::kClampedSwiglu},
                                   {"gelu_tanh", Activation::kGeluTanh}});
}

DType dtype_named(const std::string& name) {
    return enum_named<DType>("dtype", name,
                             {{"float32", DType::kFloat32}, {"bfloat16", DType::kBFloat16}});
}

WeightsArg::WeightsArg(py::handle object, const char* op, const char* name, bool optional) {
    if (py::isinstance<PackedWeights>(object)) {
        weights_ = GroupedGemmWeights(object.cast<const PackedWeights&>());
        return;
    }
    tensor_.emplace(object, op, name, optional);
    if (tensor_->view().defined()) weights_ = GroupedGemmWeights(tensor_->view());
}

void bind_ops(py::module_& module) {
    bind_packed_weights(module);

    py::class_<RoutingConfig>(module, "RoutingConfig")
        .def(py::init([](int top_k, const std::string& score_function, bool renormalize,
                         float scale, float norm_epsilon, float norm_min,
                         const std::string& group_limit, int num_groups, int topk_group) {
                 return RoutingConfig{top_k,
                                      score_function_named(score_function),
                                      renormalize,
                                      scale,
                                      norm_epsilon,
                                      norm_min,
                                      group_limit_named(group_limit),
                                      num_groups,
                                      topk_group};
             }),
             py::kw_only(), py::arg("top_k"), py::arg("score_function") = "softmax",
             py::arg("renormalize") = true, py::arg("scale") = 1.0f, py::arg("norm_epsilon") = 0.0f,
             py::arg("norm_min") = 0.0f, py::arg("group_limit") = "none", py::arg("num_groups") = 1,
             py::arg("topk_group") = 1)
        .def_readonly("top_k", &RoutingConfig::top_k);

    py::class_<GroupedGemmConfig>(module, "GroupedGemmConfig")
        .def(py::init([](const std::string& activation, bool interleaved, float alpha, float limit,
                         float up_offset) {
                 return GroupedGemmConfig{
                     activation_named(activation),
                     interleaved ? GateOrder::kInterleaved : GateOrder::kConcatenated, alpha, limit,
                     up_offset};
             }),
             py::kw_only(), py::arg("activation") = "none", py::arg("interleaved") = false,
             py::arg("alpha") = 1.702f, py::arg("limit") = 7.0f, py::arg("up_offset") = 1.0f)
        .def_property_readonly(
            "gated", [](const GroupedGemmConfig& self) { return is_gated(self.activation); });

    module.def("topk_routing",
               [](py::handle router_logits, py::handle selection_bias, const RoutingConfig& config,
                  py::handle topk_ids, py::handle topk_weights) {
                   constexpr const char* kOp = "topk_routing";
                   const TensorArg logits(router_logits, kOp, "router_logits");
                   const TensorArg bias(selection_bias, kOp, "selection_bias", true);
                   const TensorArg ids(topk_ids, kOp, "topk_ids");
                   const TensorArg weights(topk_weights, kOp, "topk_weights");
                   py::gil_scoped_release release;
                   topk_routing(logits, bias, config, ids, weights, logits.current_stream());
               });

    module.def("sort_by_expert",
               [](py::handle topk_ids, int64_t first_expert, py::handle sorted_slots,
                  py::handle slot_to_row, py::handle expert_offsets) {
                   constexpr const char* kOp = "sort_by_expert";
                   const TensorArg ids(topk_ids, kOp, "topk_ids");
                   const TensorArg slots(sorted_slots, kOp, "sorted_slots");
                   const TensorArg rows(slot_to_row, kOp, "slot_to_row");
                   const TensorArg offsets(expert_offsets, kOp, "expert_offsets");
                   py::gil_scoped_release release;
                   sort_by_expert(ids, first_expert, slots, rows, offsets, ids.current_stream());
               });

    module.def("grouped_gemm",
               [](py::handle input, py::handle weights, py::handle bias, py::handle expert_offsets,
                  py::handle sorted_slots, int slots_per_token, const GroupedGemmConfig& config,
                  py::handle output) {
                   constexpr const char* kOp = "grouped_gemm";
                   const TensorArg x(input, kOp, "input");
                   const WeightsArg w(weights, kOp, "weights");
                   const TensorArg b(bias, kOp, "bias", true);
                   const TensorArg offsets(expert_offsets, kOp, "expert_offsets");
                   const TensorArg slots(sorted_slots, kOp, "sorted_slots", true);
                   const TensorArg out(output, kOp, "output");
                   py::gil_scoped_release release;
                   grouped_gemm(x, w.weights(), b, offsets, slots, slots_per_token, config, out,
                                x.current_stream());
               });

    module.def("linear", [](py::handle input, py::handle weight, py::handle bias,
                            const GroupedGemmConfig& config, py::handle output) {
        constexpr const char* kOp = "linear";
        const TensorArg x(input, kOp, "input");
        const WeightsArg w(weight, kOp, "weight");
        const TensorArg b(bias, kOp, "bias", true);
        const TensorArg out(output, kOp, "output");
        py::gil_scoped_release release;
        linear(x, w.weights(), b, config, out, x.current_stream());
    });

    module.def("combine",
               [](py::handle expert_rows, py::handle slot_to_row, py::handle topk_weights,
                  py::handle shared_output, py::handle shared_scale, py::handle output) {
                   constexpr const char* kOp = "combine";
                   const TensorArg rows(expert_rows, kOp, "expert_rows");
                   const TensorArg slots(slot_to_row, kOp, "slot_to_row");
                   const TensorArg weights(topk_weights, kOp, "topk_weights");
                   const TensorArg shared(shared_output, kOp, "shared_output", true);
                   const TensorArg scale(shared_scale, kOp, "shared_scale", true);
                   const TensorArg out(output, kOp, "output");
                   py::gil_scoped_release release;
                   combine(rows, slots, weights, shared, scale, out, rows.current_stream());
               });
}

}  // namespace moecore::bindings
