#pragma once

#include <optional>

#include "moecore/kernels/memory.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// Makes a GPU current until the end of the scope. The CPU needs nothing, least of all a driver.
class CurrentDevice {
public:
    explicit CurrentDevice(Device device) {
        if (device.type == DeviceType::kCuda) scope_.emplace(device.index);
    }

private:
    std::optional<cuda::DeviceScope> scope_;
};

}  // namespace moecore
