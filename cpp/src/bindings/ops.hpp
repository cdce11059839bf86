#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>

#include "bindings/dlpack.hpp"
#include "moecore/error.hpp"
#include "moecore/grouped_gemm.hpp"
#include "moecore/topk_routing.hpp"

namespace moecore::bindings {

void bind_ops(pybind11::module_& module);
void bind_decoder_ops(pybind11::module_& module);
void bind_transport(pybind11::module_& module);
void bind_moe_layer(pybind11::module_& module);
void bind_decoder_layer(pybind11::module_& module);
void bind_decoder(pybind11::module_& module);

/// The value of `known` that has this name. Throws InvalidArgument that lists the names.
template <typename Enum, size_t N>
Enum enum_named(const char* argument, const std::string& name,
                const std::pair<const char*, Enum> (&known)[N]) {
    std::string names;
    for (const auto& [known_name, value] : known) {
        if (name == known_name) return value;
        names += concat(names.empty() ? "" : ", ", known_name);
    }
    throw InvalidArgument(concat(argument, " must be one of ", names, ", got ", name));
}

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
