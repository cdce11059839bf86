// What orders rows and what puts them back: sort_by_expert, and combine of its rows, on a GPU.
//
//   sort     reads and writes T * k * 12 bytes; latency, not memory, is its limit
//   combine  reads T * k * H * 2 bytes of rows, writes T * H * 2

#include <numeric>
#include <vector>

#include "gpu.hpp"
#include "harness.hpp"
#include "moecore/combine.hpp"
#include "moecore/sort_by_expert.hpp"
#include "moecore/topk_routing.hpp"

using namespace moecore;
using namespace moecore::bench;

namespace {

/// Whether slot_to_row is the stable order of ids by expert.
bool check_sort(const OwnedTensor& ids, const OwnedTensor& slot_to_row, int num_experts) {
    std::vector<int64_t> next(static_cast<size_t>(num_experts) + 1);
    const int64_t num_slots = ids.view.num_elements();
    for (int64_t s = 0; s < num_slots; ++s)
        ++next[static_cast<size_t>(ids.view.as<int32_t>()[s]) + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (int64_t s = 0; s < num_slots; ++s)
        if (slot_to_row.view.as<int32_t>()[s] !=
            next[static_cast<size_t>(ids.view.as<int32_t>()[s])]++)
            return false;
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    const Options options = parse_options(argc, argv, {1, 8, 32, 128, 512, 4096, 16384});
    constexpr int kCount = 20;
    Gpu gpu;
    const double gbps = gpu.read_gbps();
    Report report(options.json, {"shape", "T", "sort_us", "combine_us", "floor_us", "of_floor",
                                 "GB/s", "spread", "sorted"});
    report.note(gpu.name() + ", read " + format(gbps, 0) + " GB/s; " + std::to_string(kCount) +
                " calls in a CUDA graph");
    for (const LayerShape& shape : gpu_layer_shapes()) {
        if (!options.shape.empty() && options.shape != shape.name) continue;
        for (const int64_t tokens : options.tokens) {
            const int64_t num_slots = tokens * shape.top_k;
            const OwnedTensor logits =
                random_logits(tokens, shape.num_experts, options.skewed, 100);
            const OwnedTensor ids = empty_tensor(DType::kInt32, {tokens, shape.top_k});
            const OwnedTensor weights = empty_tensor(DType::kFloat32, {tokens, shape.top_k});
            topk_routing(logits.view, {}, {.top_k = shape.top_k}, ids.view, weights.view);
            const OwnedTensor ids_gpu = gpu.upload(ids), weights_gpu = gpu.upload(weights);
            const OwnedTensor slots = gpu.empty(DType::kInt32, {num_slots});
            const OwnedTensor to_row = gpu.empty(DType::kInt32, {num_slots});
            const OwnedTensor offsets = gpu.empty(DType::kInt64, {shape.num_experts + 1});
            const OwnedTensor rows =
                gpu.random(DType::kBFloat16, {num_slots, shape.hidden_size}, 1.0f, 3);
            const OwnedTensor out = gpu.empty(DType::kBFloat16, {tokens, shape.hidden_size});
            const Sample sort = gpu.measure(kCount, options.repeats, false, [&](int) {
                sort_by_expert(ids_gpu.view, 0, slots.view, to_row.view, offsets.view,
                               gpu.stream());
            });
            const Sample sum = gpu.measure(kCount, options.repeats, false, [&](int) {
                combine(rows.view, to_row.view, weights_gpu.view, {}, {}, out.view, gpu.stream());
            });
            const OwnedTensor found = empty_tensor(DType::kInt32, {num_slots});
            gpu.download(found.view.data, to_row.view);
            const double bytes =
                2.0 * static_cast<double>((num_slots + tokens) * shape.hidden_size);
            const double floor_us = bytes / gbps / 1e3;
            report.row({shape.name, std::to_string(tokens), format(sort.time_us, 2),
                        format(sum.time_us, 2), format(floor_us, 2),
                        format(floor_us / sum.time_us, 3), format(bytes / sum.time_us / 1e3, 0),
                        format(sum.spread, 2),
                        check_sort(ids, found, shape.num_experts) ? "yes" : "NO"});
        }
    }
    return 0;
}
