#include "moecore/packed_weights.hpp"

#include <algorithm>
#include <utility>

#include "cpu/panels.hpp"
#include "cpu/parallel.hpp"
#include "ops/check.hpp"

namespace moecore {
namespace {

const Check kCheck("PackedWeights");

/// Where N is contiguous, the columns of this many panels are read one after the other, a few K at
/// a time, so that memory sees runs of 1 KB and more.
constexpr int64_t kBundledPanels = 8;
constexpr int64_t kRangeK = 128;  ///< of K, a thread's piece of work; a multiple of kPackBlockK

cpu::PanelLayout checked_layout(DType dtype, int64_t num_groups, int64_t n, int64_t k_dim,
                                bool gated, Device device) {
    kCheck.that(dtype == DType::kFloat32 || dtype == DType::kBFloat16,
                "dtype must be float32 or bfloat16, got ", name_of(dtype));
    kCheck.that(num_groups >= 1, "num_groups must be >= 1, got ", num_groups);
    kCheck.that(n >= 1 && (!gated || n % 2 == 0), "n must be >= 1, and even if gated, got ", n);
    kCheck.that(k_dim >= 1, "k_dim must be >= 1, got ", k_dim);
    // Of any machine's memory; sizes and offsets in bytes then fit 64 bits with room to spare.
    constexpr double kMaxElements = 0x1p48;
    const double elements =
        static_cast<double>(num_groups) * static_cast<double>(n) * static_cast<double>(k_dim);
    kCheck.that(elements <= kMaxElements, "num_groups * n * k_dim must be at most 2^48, got ",
                num_groups, " * ", n, " * ", k_dim);
    if (device.type != DeviceType::kCpu)
        throw UnsupportedError("PackedWeights: " + to_string(device) +
                               " has no packed kernels; pass plain weights");
    return {n, k_dim, gated, dtype};
}

}  // namespace

PackedWeights::PackedWeights(DType dtype, int64_t num_groups, int64_t n, int64_t k_dim, bool gated,
                             Device device)
    : dtype_(dtype),
      num_groups_(num_groups),
      n_(n),
      k_dim_(k_dim),
      gated_(gated),
      group_stride_(checked_layout(dtype, num_groups, n, k_dim, gated, device).group_elements()),
      buffer_(device, static_cast<size_t>(num_groups * group_stride_) * size_of(dtype)) {}

void PackedWeights::pack(int64_t group, const TensorView& weights) {
    kCheck.that(!gated_, "pack needs weights made with gated = false; use pack_gated");
    kCheck.shape("weights", weights, {n_, k_dim_});
    kCheck.dtype("weights", weights, {dtype_});
    kCheck.device("weights", weights, device());
    pack_group(group, weights, {});
}

void PackedWeights::pack_gated(int64_t group, const TensorView& gate, const TensorView& up) {
    kCheck.that(gated_, "pack_gated needs weights made with gated = true; use pack");
    kCheck.shape("gate", gate, {n_ / 2, k_dim_});
    kCheck.shape("up", up, {n_ / 2, k_dim_});
    for (const auto& [name, view] : {std::pair{"gate", &gate}, std::pair{"up", &up}}) {
        kCheck.dtype(name, *view, {dtype_});
        kCheck.device(name, *view, device());
    }
    kCheck.that(gate.strides == up.strides, "gate and up must have the same strides, got [",
                gate.strides[0], ", ", gate.strides[1], "] and [", up.strides[0], ", ",
                up.strides[1], "]");
    pack_group(group, gate, up);
}

char* PackedWeights::group_data(int64_t group) {
    kCheck.that(group >= 0 && group < num_groups_, "group must be in [0, ", num_groups_, "), got ",
                group);
    return static_cast<char*>(buffer_.data()) +
           static_cast<size_t>(group * group_stride_) * size_of(dtype_);
}

void PackedWeights::pack_group(int64_t group, const TensorView& first, const TensorView& second) {
    char* target = group_data(group);
    const cpu::PanelLayout layout{n_, k_dim_, gated_, dtype_};
    const cpu::PanelSource source{first.data, second.defined() ? second.data : nullptr,
                                  first.strides[0], first.strides[1]};
    const cpu::KernelTable& table = cpu::kernels();
    const auto panel_bytes =
        static_cast<int64_t>(static_cast<size_t>(layout.panel_elements()) * size_of(dtype_));
    if (source.k_stride == 1) {
        cpu::parallel_ranges(layout.num_panels(), 1, [&](int64_t panel, int64_t) {
            cpu::pack_panel(table, layout, source, panel, 0, k_dim_, target + panel * panel_bytes,
                            true);
        });
        return;
    }
    const int64_t k_ranges = cpu::ceil_div(k_dim_, kRangeK);
    const int64_t bundles = cpu::ceil_div(layout.num_panels(), kBundledPanels);
    cpu::parallel_ranges(bundles * k_ranges, 1, [&](int64_t range, int64_t) {
        const int64_t first = range / k_ranges * kBundledPanels;
        const int64_t last = std::min(first + kBundledPanels, layout.num_panels());
        const int64_t k_begin = range % k_ranges * kRangeK;
        const int64_t k_end = std::min(k_begin + kRangeK, k_dim_);
        for (int64_t k = k_begin; k < k_end; k += cpu::kPackBlockK)
            for (int64_t panel = first; panel < last; ++panel)
                cpu::pack_panel(table, layout, source, panel, k,
                                std::min<int64_t>(cpu::kPackBlockK, k_end - k),
                                target + panel * panel_bytes +
                                    k * cpu::kPanelColumns * static_cast<int64_t>(size_of(dtype_)));
    });
}

}  // namespace moecore
