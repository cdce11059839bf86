#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "moecore/dtype.hpp"

namespace moecore {

enum class DeviceType : uint8_t { kCpu, kCuda };

struct Device {
    DeviceType type = DeviceType::kCpu;
    int index = 0;  ///< GPU ordinal; 0 on the CPU
    bool operator==(const Device&) const = default;
};

std::string to_string(Device device);

inline constexpr int kMaxRank = 4;

/// A borrowed, strided array: what every op takes. Owns nothing, copies freely.
/// A default-constructed view is absent: `defined()` is false, and an op treats the argument as not
/// given. A view of zero elements is defined, whatever its pointer.
struct TensorView {
    void* data = nullptr;
    DType dtype = DType::kFloat32;
    Device device;
    int rank = -1;
    std::array<int64_t, kMaxRank> shape{};
    std::array<int64_t, kMaxRank> strides{};  ///< in elements

    TensorView() = default;
    /// A C-contiguous view.
    TensorView(void* data, DType dtype, std::initializer_list<int64_t> shape, Device device = {});

    bool defined() const { return rank >= 0; }
    int64_t num_elements() const;  ///< at most INT64_MAX: an expanded view may claim more
    bool is_empty() const;         ///< a dimension of size 0
    bool is_contiguous() const;    ///< C order; dimensions of size 1 may have any stride
    template <typename T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

/// "[4, 1024] bfloat16 on cpu", for messages.
std::string to_string(const TensorView& view);

}  // namespace moecore
