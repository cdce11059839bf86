#include "bindings/named_tensors.hpp"

namespace py = pybind11;

namespace moecore::bindings {

py::object NamedTensors::object(const char* name) const {
    return objects_.contains(name) ? py::object(objects_[name]) : py::none();
}

TensorView NamedTensors::tensor(const char* name) {
    return tensor_args_.emplace_back(object(name), op_, name, true).view();
}

GroupedGemmWeights NamedTensors::weights(const char* name) {
    return weight_args_.emplace_back(object(name), op_, name, true).weights();
}

}  // namespace moecore::bindings
