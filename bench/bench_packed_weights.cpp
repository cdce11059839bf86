// Packing of plain weights into panels, every layout that checkpoints come in.
//
//   bytes  the matrix read once and its panels written once
//
// layout: which dimension is contiguous; "pairs" are gpt-oss' interleaved gate and up. Enough
// matrices take turns that each comes from memory, not from a cache.

#include <algorithm>
#include <cstring>
#include <vector>

#include "harness.hpp"
#include "moecore/build_info.hpp"
#include "moecore/packed_weights.hpp"
#include "moecore/threads.hpp"

using namespace moecore;
using namespace moecore::bench;

namespace {

constexpr int64_t kColdBytes = int64_t{192} << 20;  ///< all matrices: more than any cache

struct Layout {
    const char* name;
    bool is_n_contiguous, gated, interleaved;
};
constexpr Layout kLayouts[] = {{"K", false, false, false},
                               {"N", true, false, false},
                               {"K gate, up", false, true, false},
                               {"N gate, up", true, true, false},
                               {"N pairs", true, true, true}};

/// Feature `row` of a matrix, as a view of `rows` features that are `step` apart.
TensorView part(const TensorView& matrix, int64_t row, int64_t rows, int64_t step) {
    TensorView view = matrix;
    view.data = static_cast<char*>(matrix.data) +
                row * matrix.strides[0] * static_cast<int64_t>(size_of(matrix.dtype));
    view.shape[0] = rows;
    view.strides[0] *= step;
    return view;
}

void pack(PackedWeights& packed, int64_t group, const TensorView& matrix, const Layout& layout) {
    if (!layout.gated) return packed.pack(group, matrix);
    const int64_t width = matrix.shape[0] / 2;
    if (layout.interleaved)
        packed.pack_gated(group, part(matrix, 0, width, 2), part(matrix, 1, width, 2));
    else
        packed.pack_gated(group, part(matrix, 0, width, 1), part(matrix, width, width, 1));
}

/// Every element of group 0 is where the order of panels says, element by element.
bool is_packed_right(const PackedWeights& packed, const TensorView& matrix, const Layout& layout) {
    const size_t size = size_of(matrix.dtype);
    const int64_t pair = size == 2 ? 2 : 1;  // neighbours along K that lie side by side
    const int64_t padded_k = (matrix.shape[1] + pair - 1) / pair * pair;
    const auto* panels = static_cast<const char*>(packed.data());
    for (int64_t row = 0; row < matrix.shape[0]; ++row) {
        int64_t panel = row / 64, column = row % 64;
        if (layout.gated) {
            const int64_t width = matrix.shape[0] / 2;
            const int64_t feature = layout.interleaved ? row / 2 : row % width;
            const bool is_up = layout.interleaved ? row % 2 != 0 : row >= width;
            panel = feature / 32;
            column = feature % 32 + 32 * is_up;
        }
        for (int64_t k = 0; k < matrix.shape[1]; ++k) {
            const int64_t at = panel * padded_k * 64 + k / pair * pair * 64 + column * pair;
            const int64_t from = row * matrix.strides[0] + k * matrix.strides[1];
            if (std::memcmp(
                    panels + static_cast<size_t>(at + k % pair) * size,
                    static_cast<const char*>(matrix.data) + static_cast<size_t>(from) * size,
                    size) != 0)
                return false;
        }
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    const Options options = parse_options(argc, argv, {});
    BandwidthProbe probe;
    Report report(options.json, {"shape", "dtype", "contiguous", "N", "K", "MB", "GB/s roof",
                                 "floor_us", "time_us", "x_floor", "GB/s", "spread", "correct"});
    report.note("isa " + build_info().cpu_isa + ", threads " + std::to_string(num_threads()));
    for (const LayerShape& shape : layer_shapes()) {
        if (!options.shape.empty() && options.shape != shape.name) continue;
        for (const DType dtype : {DType::kBFloat16, DType::kFloat32})
            for (const Layout& layout : kLayouts) {
                const int64_t n = layout.gated ? 2 * shape.intermediate_size : shape.hidden_size;
                const int64_t k_dim = layout.gated ? shape.hidden_size : shape.intermediate_size;
                const auto size = static_cast<int64_t>(size_of(dtype));
                const int64_t groups = std::max<int64_t>(2, kColdBytes / (n * k_dim * size));
                const OwnedTensor source = random_tensor(dtype, {groups, n, k_dim}, 1.0f, 3);
                PackedWeights packed(dtype, groups, n, k_dim, layout.gated);
                const auto matrix = [&](int64_t group) {
                    TensorView view(source.view.as<char>() + group * n * k_dim * size, dtype,
                                    {n, k_dim});
                    if (layout.is_n_contiguous) view.strides = {1, n, 0, 0};
                    return view;
                };
                for (int64_t g = 0; g < groups; ++g) pack(packed, g, matrix(g), layout);
                const Sample sample = measure(options.repeats, probe, [&](int i) {
                    pack(packed, i % groups, matrix(i % groups), layout);
                });
                const double bytes = 2.0 * static_cast<double>(n * k_dim * size);
                const double floor_us = bytes / sample.read_gbps / 1e3;
                report.row({shape.name, name_of(dtype), layout.name, std::to_string(n),
                            std::to_string(k_dim), format(bytes / 1e6, 1),
                            format(sample.read_gbps, 1), format(floor_us, 1),
                            format(sample.time_us, 1), format(sample.time_us / floor_us, 2),
                            format(bytes / sample.time_us / 1e3, 1), format(sample.spread, 2),
                            is_packed_right(packed, matrix(0), layout) ? "yes" : "NO"});
            }
    }
    return 0;
}
