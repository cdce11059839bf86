#include "moecore/locate_results.hpp"

#include <limits>

#include "moecore/kernels/locate_results.hpp"
#include "moecore/kernels/memory.hpp"
#include "ops/check.hpp"

namespace moecore {

void locate_results(const TensorView& topk_ids, const TensorView& first_experts,
                    const TensorView& output, Stream stream) {
    const Check check("locate_results");
    check.dtype("topk_ids", topk_ids, {DType::kInt32});
    check.shape("topk_ids", topk_ids, {Check::kAny, Check::kAny});
    check.contiguous("topk_ids", topk_ids);
    const int64_t num_slots = topk_ids.num_elements();
    check.dtype("first_experts", first_experts, {DType::kInt32});
    check.shape("first_experts", first_experts, {Check::kAny});
    check.contiguous("first_experts", first_experts);
    check.device("first_experts", first_experts, topk_ids.device);
    const int64_t num_ranks = first_experts.shape[0] - 1;
    check.that(num_ranks >= 1, "first_experts must have at least 2 entries, got ", num_ranks + 1);
    check.that(num_slots <= std::numeric_limits<int32_t>::max() / num_ranks,
               "topk_ids must have fewer than 2^31 / P entries, got ", num_slots, " with P ",
               num_ranks);
    check.dtype("output", output, {DType::kInt32});
    check.shape("output", output, {num_slots});
    check.contiguous("output", output);
    check.device("output", output, topk_ids.device);
    check.no_overlap("output", output, "topk_ids", topk_ids);
    check.no_overlap("output", output, "first_experts", first_experts);

    const LocateResultsArgs args{
        .topk_ids = topk_ids.as<int32_t>(),
        .first_experts = first_experts.as<int32_t>(),
        .output = output.as<int32_t>(),
        .num_slots = num_slots,
        .num_ranks = static_cast<int>(num_ranks),
    };
    switch (topk_ids.device.type) {
        case DeviceType::kCpu:
            return cpu::locate_results(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(topk_ids.device.index);
            return cuda::locate_results(args, stream);
        }
    }
}

}  // namespace moecore
