#include "moecore/tensor_view.hpp"

#include <algorithm>
#include <limits>

#include "moecore/error.hpp"

namespace moecore {

std::string to_string(Device device) {
    return device.type == DeviceType::kCpu ? "cpu" : concat("cuda:", device.index);
}

TensorView::TensorView(void* data, DType dtype, std::initializer_list<int64_t> sizes, Device device)
    : data(data), dtype(dtype), device(device), rank(static_cast<int>(sizes.size())) {
    require(rank <= kMaxRank, "TensorView: rank must be at most ", kMaxRank, ", got ", rank);
    int i = 0;
    for (const int64_t size : sizes) shape[i++] = size;
    int64_t stride = 1;
    for (i = rank - 1; i >= 0; --i) {
        strides[i] = stride;
        stride *= shape[i];
    }
}

int64_t TensorView::num_elements() const {
    if (is_empty()) return 0;
    int64_t count = 1;
    for (int i = 0; i < rank; ++i)
        if (__builtin_mul_overflow(count, shape[i], &count))
            return std::numeric_limits<int64_t>::max();
    return count;
}

bool TensorView::is_empty() const {
    return std::find(shape.begin(), shape.begin() + std::max(rank, 0), 0) !=
           shape.begin() + std::max(rank, 0);
}

bool TensorView::is_contiguous() const {
    if (is_empty()) return true;
    int64_t stride = 1;
    for (int i = rank - 1; i >= 0; --i) {
        if (shape[i] > 1 && strides[i] != stride) return false;
        stride *= shape[i];
    }
    return true;
}

std::string to_string(const TensorView& view) {
    std::string text = "[";
    for (int i = 0; i < view.rank; ++i) text += concat(i ? ", " : "", view.shape[i]);
    return concat(text, "] ", name_of(view.dtype), " on ", to_string(view.device));
}

}  // namespace moecore
