#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "bindings/dlpack.hpp"
#include "moecore/grouped_gemm.hpp"
#include "moecore/topk_routing.hpp"

namespace moecore::bindings {

void bind_ops(pybind11::module_& module);
void bind_decoder_ops(pybind11::module_& module);
void bind_moe_layer(pybind11::module_& module);

/// "softmax" and so on; each throws InvalidArgument that lists the names it knows.
ScoreFunction score_function_named(const std::string& name);
GroupLimit group_limit_named(const std::string& name);
Activation activation_named(const std::string& name);
DType dtype_named(const std::string& name);

/// A weights argument: a PackedWeights or a tensor. Valid while the Python object lives.
class WeightsArg {
public:
    WeightsArg(pybind11::handle object, const char* op, const char* name, bool optional = false);
    const GroupedGemmWeights& weights() const { return weights_; }

private:
    std::optional<TensorArg> tensor_;
    GroupedGemmWeights weights_;
};

}  // namespace moecore::bindings
