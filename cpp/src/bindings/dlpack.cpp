#include "bindings/dlpack.hpp"

#include "bindings/dlpack_abi.hpp"
#include "moecore/error.hpp"

namespace py = pybind11;

namespace moecore::bindings {
namespace {

/// What moecore knows of one Python type, found at its first use. Types live as long as the process
/// in practice; a stale entry is replaced when another type takes its address and fails to match.
struct KnownType {
    PyTypeObject* type = nullptr;
    const dlpack::ExchangeApi* api = nullptr;  ///< nullptr: use __dlpack__
};

const dlpack::ExchangeApi* find_exchange_api(PyTypeObject* type) {
    const auto attribute = py::reinterpret_steal<py::object>(
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
    if (!attribute) {
        PyErr_Clear();
        return nullptr;
    }
    void* table = PyCapsule_GetPointer(attribute.ptr(), "dlpack_exchange_api");
    if (table == nullptr) {
        PyErr_Clear();
        return nullptr;
    }
    const auto* api = static_cast<const dlpack::ExchangeApi*>(table);
    while (api != nullptr && api->version.major != 1) api = api->previous;
    return api != nullptr && api->tensor_from_object != nullptr ? api : nullptr;
}

/// The GIL guards the cache. Two entries serve torch.Tensor and torch.nn.Parameter.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
    static KnownType known[4];
    static int next = 0;
    for (const KnownType& entry : known)
        if (entry.type == type) return entry.api;
    KnownType& entry = known[next];
    next = (next + 1) % 4;
    Py_INCREF(type);  // a cached type must not be freed, or its address could be reused
    Py_XDECREF(entry.type);
    entry = {type, find_exchange_api(type)};
    return entry.api;
}

DType to_dtype(dlpack::DataType type, const char* op, const char* name) {
    if (type.lanes == 1) {
        if (type.code == dlpack::kFloat && type.bits == 32) return DType::kFloat32;
        if (type.code == dlpack::kBFloat && type.bits == 16) return DType::kBFloat16;
        if (type.code == dlpack::kInt && type.bits == 32) return DType::kInt32;
        if (type.code == dlpack::kInt && type.bits == 64) return DType::kInt64;
    }
    static const char* const kCodes[] = {"int",    "uint",    "float", "opaque",
                                         "bfloat", "complex", "bool"};
    throw InvalidArgument(concat(op, ": ", name, " must be float32, bfloat16, int32 or int64, got ",
                                 type.code < 7 ? kCodes[type.code] : "type ",
                                 static_cast<int>(type.bits)));
}

TensorView to_view(const dlpack::Tensor& tensor, const char* op, const char* name) {
    TensorView view;
    view.dtype = to_dtype(tensor.dtype, op, name);
    switch (tensor.device.type) {
        case dlpack::kCpu:
        case dlpack::kCudaHost:
            view.device = {DeviceType::kCpu, 0};
            break;
        case dlpack::kCuda:
            view.device = {DeviceType::kCuda, tensor.device.index};
            break;
        default:
            throw InvalidArgument(concat(op, ": ", name,
                                         " must be on the CPU or a CUDA device, got "
                                         "DLPack device type ",
                                         tensor.device.type));
    }
    require(tensor.rank <= kMaxRank, op, ": ", name, " must have at most ", kMaxRank,
            " dimensions, got ", tensor.rank);
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    view.rank = tensor.rank;
    int64_t stride = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
        view.shape[i] = tensor.shape[i];
        view.strides[i] = tensor.strides ? tensor.strides[i] : stride;
        stride *= view.shape[i];
    }
    // A tensor that only pretends to be on its device, such as torch's FakeTensor.
    require(tensor.data != nullptr || view.is_empty(), op, ": ", name,
            " must have memory, got none for ", view);
    return view;
}

/// What an exporter's exception says, without the stack that torch appends, as an error that names
/// the argument.
[[noreturn]] void throw_not_exported(py::error_already_set& error, py::handle object,
                                     const char* op, const char* name) {
    const std::string message = py::str(error.value());
    throw InvalidArgument(
        concat(op, ": ", name, " must be a dense tensor on the CPU or a CUDA device, got ",
               Py_TYPE(object.ptr())->tp_name, " (", message.substr(0, message.find('\n')), ")"));
}

[[noreturn]] void throw_not_a_tensor(py::handle object, const char* op, const char* name) {
    throw py::type_error(concat(op, ": ", name,
                                " must be a tensor (an object with __dlpack__), got ",
                                Py_TYPE(object.ptr())->tp_name));
}

}  // namespace

TensorArg::TensorArg(py::handle object, const char* op, const char* name, bool optional) {
    if (object.is_none()) {
        if (optional) return;
        throw_not_a_tensor(object, op, name);
    }
    if (const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
        dlpack::Tensor tensor;
        if (api->tensor_from_object(object.ptr(), &tensor) != 0) {
            py::error_already_set error;
            throw_not_exported(error, object, op, name);
        }
        view_ = to_view(tensor, op, name);
        if (view_.device.type == DeviceType::kCuda && api->current_stream != nullptr &&
            api->current_stream(dlpack::kCuda, view_.device.index, &stream_.handle) != 0)
            throw py::error_already_set();
        return;
    }
    if (!py::hasattr(object, "__dlpack__")) throw_not_a_tensor(object, op, name);
    py::capsule capsule;
    try {
        capsule = object.attr("__dlpack__")();
    } catch (py::error_already_set& error) {
        throw_not_exported(error, object, op, name);
    }
    if (capsule.name() == std::string("dltensor_versioned")) {
        auto* managed = capsule.get_pointer<dlpack::ManagedTensorVersioned>();
        view_ = to_view(managed->tensor, op, name);
        capsule.set_name("used_dltensor_versioned");
        managed_ = managed;
        is_versioned_ = true;
    } else {
        auto* managed = capsule.get_pointer<dlpack::ManagedTensor>();
        view_ = to_view(managed->tensor, op, name);
        capsule.set_name("used_dltensor");
        managed_ = managed;
    }
}

TensorArg::~TensorArg() {
    if (managed_ == nullptr) return;
    if (is_versioned_) {
        auto* managed = static_cast<dlpack::ManagedTensorVersioned*>(managed_);
        if (managed->deleter) managed->deleter(managed);
    } else {
        auto* managed = static_cast<dlpack::ManagedTensor*>(managed_);
        if (managed->deleter) managed->deleter(managed);
    }
}

}  // namespace moecore::bindings
