#pragma once

// The parts of DLPack's binary interface that moecore reads, version 1.x. Field order and types are
// the specification's (https://dmlc.github.io/dlpack/latest/c_api.html); names are this project's.

#include <cstdint>

namespace moecore::dlpack {

struct Version {
    uint32_t major, minor;
};

enum DeviceCode : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
struct Device {
    int32_t type;  ///< a DeviceCode
    int32_t index;
};

enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBFloat = 4 };
struct DataType {
    uint8_t code;  ///< a TypeCode
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t rank;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  ///< in elements; nullptr means C order
    uint64_t byte_offset;
};

struct ManagedTensor {  ///< capsule "dltensor"
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};

struct ManagedTensorVersioned {  ///< capsule "dltensor_versioned"
    Version version;
    void* context;
    void (*deleter)(ManagedTensorVersioned*);
    uint64_t flags;
    Tensor tensor;
};

/// The table behind a type's __dlpack_c_exchange_api__ capsule, named "dlpack_exchange_api".
struct ExchangeApi {
    Version version;
    ExchangeApi* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*tensor_from_object)(void* object, Tensor* out);  ///< borrows; may be nullptr
    int (*current_stream)(int32_t device_type, int32_t device_index, void** out);
};

}  // namespace moecore::dlpack
