#include "ops/check.hpp"

#include <cstdint>

namespace moecore {
namespace {

std::string sizes_to_string(std::initializer_list<int64_t> sizes) {
    std::string text = "[";
    const char* separator = "";
    for (const int64_t size : sizes) {
        text += separator;
        text += size == Check::kAny ? "any" : std::to_string(size);
        separator = ", ";
    }
    return text + "]";
}

std::string strides_to_string(const TensorView& view) {
    std::string text = "[";
    for (int i = 0; i < view.rank; ++i) text += concat(i ? ", " : "", view.strides[i]);
    return text + "]";
}

/// First byte and one past the last of a view with non-negative strides.
struct ByteRange {
    uintptr_t begin, end;
};

ByteRange byte_range(const TensorView& view) {
    const auto begin = reinterpret_cast<uintptr_t>(view.data);
    int64_t last = 0;
    for (int i = 0; i < view.rank; ++i) last += (view.shape[i] - 1) * view.strides[i];
    return {begin, begin + static_cast<uintptr_t>(last + 1) * size_of(view.dtype)};
}

}  // namespace

void Check::dtype(const char* name, const TensorView& view,
                  std::initializer_list<DType> allowed) const {
    std::string names;
    for (const DType candidate : allowed) {
        if (view.dtype == candidate) return;
        names += concat(names.empty() ? "" : " or ", name_of(candidate));
    }
    that(false, name, " must be ", names, ", got ", name_of(view.dtype));
}

void Check::shape(const char* name, const TensorView& view,
                  std::initializer_list<int64_t> sizes) const {
    bool matches = view.rank == static_cast<int>(sizes.size());
    int i = 0;
    for (const int64_t size : sizes) {
        if (!matches) break;
        matches = size == kAny || view.shape[i] == size;
        ++i;
    }
    if (!matches) that(false, name, " must have shape ", sizes_to_string(sizes), ", got ", view);
}

void Check::contiguous(const char* name, const TensorView& view) const {
    if (!view.is_contiguous())
        that(false, name, " must be contiguous, got strides ", strides_to_string(view),
             " for shape ", view);
}

void Check::rows_contiguous(const char* name, const TensorView& view) const {
    if (view.is_empty()) return;
    const int last = view.rank - 1;
    bool holds = view.shape[last] == 1 || view.strides[last] == 1;
    int64_t extent = view.shape[last];  // elements that one step of the next dimension must clear
    for (int i = last - 1; i >= 0; --i) {
        if (view.shape[i] == 1) continue;
        holds = holds && view.strides[i] >= extent;
        extent = view.strides[i] * view.shape[i];
    }
    if (!holds)
        that(false, name,
             " must have contiguous rows that do not overlap (last stride 1, row stride at least "
             "the row's length), got strides ",
             strides_to_string(view), " for shape ", view);
}

void Check::matrix_strides(const char* name, const TensorView& view) const {
    const int k = view.rank - 1, n = view.rank - 2;
    bool holds =
        view.strides[k] == 1 || view.strides[n] == 1 || view.shape[n] == 1 || view.shape[k] == 1;
    for (int i = 0; i < view.rank; ++i) holds = holds && view.strides[i] >= 0;
    if (!holds && !view.is_empty())
        that(false, name,
             " must have one of their last two dimensions contiguous and no negative stride, got "
             "strides ",
             strides_to_string(view));
}

void Check::device(const char* name, const TensorView& view, Device expected) const {
    if (!(view.device == expected))
        that(false, name, " must be on ", expected, ", got ", view.device);
}

bool overlap(const TensorView& a, const TensorView& b) {
    if (a.is_empty() || b.is_empty() || !(a.device == b.device)) return false;
    const ByteRange range_a = byte_range(a), range_b = byte_range(b);
    if (range_a.end <= range_b.begin || range_b.end <= range_a.begin) return false;
    // Column slices of one matrix interleave without sharing a byte.
    if (a.rank == 2 && b.rank == 2) {
        const uintptr_t pitch_a = static_cast<uintptr_t>(a.strides[0]) * size_of(a.dtype);
        const uintptr_t pitch_b = static_cast<uintptr_t>(b.strides[0]) * size_of(b.dtype);
        if (pitch_a == pitch_b && pitch_a > 0) {
            const uintptr_t width_a = static_cast<uintptr_t>(a.shape[1]) * size_of(a.dtype);
            const uintptr_t width_b = static_cast<uintptr_t>(b.shape[1]) * size_of(b.dtype);
            const uintptr_t low = range_a.begin < range_b.begin ? range_a.begin : range_b.begin;
            const uintptr_t column_a = (range_a.begin - low) % pitch_a;
            const uintptr_t column_b = (range_b.begin - low) % pitch_a;
            const bool a_first = column_a < column_b;
            const uintptr_t gap = a_first ? column_b - column_a : column_a - column_b;
            const uintptr_t first_width = a_first ? width_a : width_b;
            const uintptr_t second_width = a_first ? width_b : width_a;
            if (gap >= first_width && gap + second_width <= pitch_a) return false;
        }
    }
    return true;
}

void Check::no_overlap(const char* output_name, const TensorView& output, const char* input_name,
                       const TensorView& input) const {
    if (input.defined() && overlap(output, input))
        that(false, output_name, " must not overlap ", input_name, ", got shared memory");
}

}  // namespace moecore
