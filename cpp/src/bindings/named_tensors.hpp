#pragma once

#include <pybind11/pybind11.h>

#include <deque>

#include "bindings/ops.hpp"

namespace moecore::bindings {

/// Python's tensors and packed weights by name, for an object that uses them longer than one call:
/// views stay valid while this lives. A name that is missing, or None, gives an absent view.
class NamedTensors {
public:
    NamedTensors(const char* op, pybind11::dict objects) : op_(op), objects_(std::move(objects)) {}

    TensorView tensor(const char* name);
    GroupedGemmWeights weights(const char* name);
    pybind11::object object(const char* name) const;

private:
    const char* op_;
    pybind11::dict objects_;
    // A tensor without an exchange API lends its memory through its capsule, which these hold.
    std::deque<TensorArg> tensor_args_;
    std::deque<WeightsArg> weight_args_;
};

}  // namespace moecore::bindings
