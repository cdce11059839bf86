// The two grouped GEMMs of a layer: gate_up with the gather and SwiGLU, and down.
//
//   bytes  the weights of the experts that this routing touches, input rows and output
//   flops  2 * T * k * N * K
//
// Weights: packed, plain with K contiguous, plain with N contiguous. Several sets take turns, so
// that every run finds its weights in memory, not in a cache.

#include <algorithm>
#include <vector>

#include "harness.hpp"
#include "moecore/build_info.hpp"
#include "moecore/grouped_gemm.hpp"
#include "moecore/sort_by_expert.hpp"
#include "moecore/threads.hpp"
#include "moecore/topk_routing.hpp"
#include "reference.hpp"

using namespace moecore;
using namespace moecore::bench;

namespace {

constexpr int64_t kColdBytes = int64_t{300} << 20;  ///< all weights: more than any cache
const char* const kLayouts[] = {"packed", "plain K", "plain N"};

/// Which rows each expert gets.
struct Rows {
    OwnedTensor sorted_slots, slot_to_row, expert_offsets;
    int num_active;
};

Rows route(const LayerShape& shape, int64_t tokens) {
    const OwnedTensor logits = random_tensor(DType::kFloat32, {tokens, shape.num_experts}, 1, 23);
    const OwnedTensor ids = empty_tensor(DType::kInt32, {tokens, shape.top_k});
    const OwnedTensor weights = empty_tensor(DType::kFloat32, {tokens, shape.top_k});
    topk_routing(logits.view, {}, {.top_k = shape.top_k}, ids.view, weights.view);
    const int64_t slots = tokens * shape.top_k;
    Rows rows{empty_tensor(DType::kInt32, {slots}), empty_tensor(DType::kInt32, {slots}),
              empty_tensor(DType::kInt64, {shape.num_experts + 1}), 0};
    sort_by_expert(ids.view, 0, rows.sorted_slots.view, rows.slot_to_row.view,
                   rows.expert_offsets.view);
    const int64_t* offsets = rows.expert_offsets.view.as<int64_t>();
    for (int e = 0; e < shape.num_experts; ++e) rows.num_active += offsets[e] < offsets[e + 1];
    return rows;
}

/// One GEMM's weights in every layout: the same numbers packed and with K contiguous; the third
/// reads the plain memory with N contiguous, which are other numbers.
struct Weights {
    OwnedTensor plain;
    PackedWeights packed;

    GroupedGemmWeights in(size_t layout) const {
        if (layout == 0) return packed;
        TensorView view = plain.view;
        if (layout == 2) view.strides = {view.shape[1] * view.shape[2], 1, view.shape[1], 0};
        return view;
    }
};

Weights make_weights(int64_t groups, int64_t n, int64_t k_dim, bool gated, uint64_t seed) {
    Weights made{random_tensor(DType::kBFloat16, {groups, n, k_dim}, 0.05f, seed),
                 PackedWeights(DType::kBFloat16, groups, n, k_dim, gated)};
    for (int64_t g = 0; g < groups; ++g) {
        uint16_t* matrix = made.plain.view.as<uint16_t>() + g * n * k_dim;
        if (!gated) {
            made.packed.pack(g, TensorView(matrix, DType::kBFloat16, {n, k_dim}));
        } else {
            const TensorView gate(matrix, DType::kBFloat16, {n / 2, k_dim});
            const TensorView up(matrix + n / 2 * k_dim, DType::kBFloat16, {n / 2, k_dim});
            made.packed.pack_gated(g, gate, up);
        }
    }
    return made;
}

void bench_gemm(const LayerShape& shape, bool gated, const Options& options, BandwidthProbe& probe,
                double peak, Report& report) {
    const int64_t n = gated ? 2 * shape.intermediate_size : shape.hidden_size;
    const int64_t k_dim = gated ? shape.hidden_size : shape.intermediate_size;
    const int64_t width = gated ? n / 2 : n;
    const int64_t set_bytes = 2 * shape.num_experts * n * k_dim;
    const auto num_sets =
        static_cast<size_t>(std::max<int64_t>(1, (kColdBytes + set_bytes - 1) / set_bytes));
    std::vector<Weights> sets;
    for (size_t s = 0; s < num_sets; ++s)
        sets.push_back(make_weights(shape.num_experts, n, k_dim, gated, s + 1));
    const GroupedGemmConfig config{.activation = gated ? Activation::kSwiglu : Activation::kNone};
    for (const int64_t tokens : options.tokens) {
        const Rows rows = route(shape, tokens);
        const int64_t num_rows = tokens * shape.top_k;
        const int64_t num_inputs = gated ? tokens : num_rows;
        const OwnedTensor input = random_tensor(DType::kBFloat16, {num_inputs, k_dim}, 1.0f, 7);
        const OwnedTensor output = empty_tensor(DType::kBFloat16, {num_rows, width});
        const TensorView slots = gated ? rows.sorted_slots.view : TensorView{};
        const int per_token = gated ? shape.top_k : 1;
        for (size_t layout = 0; layout < std::size(kLayouts); ++layout) {
            const auto run = [&](size_t set) {
                grouped_gemm(input.view, sets[set].in(layout), {}, rows.expert_offsets.view, slots,
                             per_token, config, output.view);
            };
            // One sample is a pass over the sets, so that short runs are not lost in the clock.
            const Sample sample = measure(options.repeats, probe, [&](int) {
                for (size_t set = 0; set < num_sets; ++set) run(set);
            });
            const double time_us = sample.time_us / static_cast<double>(num_sets);
            const double bytes = 2.0 * static_cast<double>(rows.num_active * n * k_dim +
                                                           num_inputs * k_dim + num_rows * width);
            const double flops = 2.0 * static_cast<double>(num_rows) * static_cast<double>(n) *
                                 static_cast<double>(k_dim);
            const double floor_us =
                std::max(bytes / sample.read_gbps / 1e3, peak > 0 ? flops / peak / 1e3 : 0.0);
            run(0);
            const GroupedGemmWeights plain = sets[0].in(std::max<size_t>(layout, 1));
            const bool correct =
                check_grouped_gemm(input.view, plain.plain, rows.expert_offsets.view, slots,
                                   per_token, gated, output.view);
            report.row({shape.name, gated ? "gate_up" : "down", kLayouts[layout],
                        std::to_string(tokens), format(bytes / 1e6, 1), format(flops / 1e9, 2),
                        format(sample.read_gbps, 1), format(floor_us, 1), format(time_us, 1),
                        format(time_us / floor_us, 2), format(bytes / time_us / 1e3, 1),
                        format(flops / time_us / 1e3, 1), format(sample.spread, 2),
                        correct ? "yes" : "NO"});
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    const Options options = parse_options(argc, argv, {1, 8, 32, 128, 512});
    BandwidthProbe probe;
    const double peak = matmul_gflops(true);
    Report report(options.json,
                  {"shape", "gemm", "weights", "T", "MB", "GFLOP", "GB/s roof", "floor_us",
                   "time_us", "x_floor", "GB/s", "GFLOP/s", "spread", "correct"});
    report.note("isa " + build_info().cpu_isa + ", threads " + std::to_string(num_threads()) +
                ", matmul peak " + format(peak, 0) + " GFLOP/s");
    for (const LayerShape& shape : layer_shapes()) {
        if (!options.shape.empty() && options.shape != shape.name) continue;
        for (const bool gated : {true, false})
            bench_gemm(shape, gated, options, probe, peak, report);
    }
    return 0;
}
