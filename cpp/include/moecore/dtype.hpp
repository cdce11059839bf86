#pragma once

#include <cstddef>
#include <cstdint>

namespace moecore {

enum class DType : uint8_t { kFloat32, kBFloat16, kInt32, kInt64 };

constexpr size_t size_of(DType dtype) {
    switch (dtype) {
        case DType::kBFloat16:
            return 2;
        case DType::kFloat32:
        case DType::kInt32:
            return 4;
        case DType::kInt64:
            return 8;
    }
    return 0;
}

constexpr const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::kFloat32:
            return "float32";
        case DType::kBFloat16:
            return "bfloat16";
        case DType::kInt32:
            return "int32";
        case DType::kInt64:
            return "int64";
    }
    return "unknown";
}

}  // namespace moecore
