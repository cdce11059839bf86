#include "runtime/device_plan.hpp"

#include <algorithm>
#include <limits>

#include "moecore/kernels/plan_dispatch.hpp"
#include "moecore/kernels/sort_by_expert.hpp"
#include "runtime/take_all.hpp"

namespace moecore {
namespace {

constexpr int kMostBins = 1024;  ///< that sort_by_expert takes

/// The bin of each expert's owner: group * P + rank.
std::vector<int32_t> bins_of_experts(const ExpertPlaces& places, int num_experts) {
    std::vector<int32_t> bins;
    for (int expert = 0; expert < num_experts; ++expert) {
        const ExpertPlaces::Place place = places.of(expert);
        bins.push_back(place.group * places.num_ranks() + place.owner);
    }
    return bins;
}

SortByExpertArgs sort_of(const TensorView& keys, int64_t first, int64_t num_keys,
                         const TensorView& sorted, const TensorView& places,
                         const TensorView& offsets) {
    return {.topk_ids = keys.as<int32_t>(),
            .sorted_slots = sorted.as<int32_t>(),
            .slot_to_row = places.as<int32_t>(),
            .expert_offsets = offsets.as<int64_t>(),
            .num_slots = keys.num_elements(),
            .first_expert = first,
            .num_local_experts = static_cast<int>(num_keys)};
}

void take_counts(const int64_t* offsets, RowCounts& counts) {
    for (size_t bin = 0; bin < counts.counts.size(); ++bin)
        counts.counts[bin] = offsets[bin + 1] - offsets[bin];
}

}  // namespace

bool can_plan_on_device(const ExpertParallel::Call& call, int num_ranks, int num_groups,
                        int64_t max_tokens) {
    const int64_t slots = int64_t{num_ranks} * max_tokens * call.config.routing.top_k;
    return call.how.combine == CombineMode::kExact && num_ranks * num_groups <= kMostBins &&
           call.config.num_local_experts <= kMostBins && max_tokens > 0 &&
           slots <= std::numeric_limits<int32_t>::max() / 2;
}

PlanTensors plan_on_device(Transport& transport, const ExpertParallel::Call& call,
                           const ExpertPlaces& places, int64_t max_tokens, PlanStorage& storage,
                           DispatchPlan& plan, Stream stream) {
    const MoEConfig& config = call.config;
    const Device device = transport.device();
    const int64_t ranks = transport.size(), k = config.routing.top_k, experts = config.num_experts;
    const int64_t groups = places.num_groups(), bins = groups * ranks;
    const int64_t pairs = ranks * max_tokens, own_slots = max_tokens * k, slots = pairs * k;
    const int64_t width = int64_t{config.num_local_experts} + 1;
    if (storage.device_memory.device() != device) storage.device_memory = Workspace(device, 0);

    TensorView bin_of, own_ids, all_ids, sent, received_back, received, sent_back;
    TensorView sorted_sent, place_of_pair, sorted_own, slot_to_back, sorted_received, copy_of_token;
    TensorView sorted_rows, row_of_slot, sorted_back, place_of_back;
    TensorView sent_tokens, sorted_slots, back_rows;
    TensorView counts, expert_offsets, group_offsets;
    const DType i32 = DType::kInt32, i64 = DType::kInt64;
    take_all(storage.device_memory, {{&bin_of, i32, experts},
                                     {&own_ids, i32, max_tokens, k},
                                     {&all_ids, i32, pairs, k},
                                     {&sent, i32, max_tokens, ranks},
                                     {&received_back, i32, max_tokens, k},
                                     {&received, i32, ranks, max_tokens},
                                     {&sent_back, i32, pairs, k},
                                     {&sorted_sent, i32, pairs},
                                     {&place_of_pair, i32, pairs},
                                     {&sorted_own, i32, own_slots},
                                     {&slot_to_back, i32, own_slots},
                                     {&sorted_received, i32, pairs},
                                     {&copy_of_token, i32, pairs},
                                     {&sorted_rows, i32, slots},
                                     {&row_of_slot, i32, slots},
                                     {&sorted_back, i32, slots},
                                     {&place_of_back, i32, slots},
                                     {&sent_tokens, i32, pairs},
                                     {&sorted_slots, i32, slots},
                                     {&back_rows, i32, slots},
                                     {&counts, i64, 4 * (bins + 1)},
                                     {&expert_offsets, i64, width},
                                     {&group_offsets, i64, groups * width}});

    // 1. Everybody's routes; ranks with fewer tokens have no expert's id in the rest.
    const std::vector<int32_t> table = bins_of_experts(places, config.num_experts);
    const size_t table_bytes = table.size() * sizeof(int32_t);
    const size_t count_bytes = static_cast<size_t>(4 * (bins + 1)) * sizeof(int64_t);
    char* pinned = static_cast<char*>(storage.pinned.reserve(table_bytes + count_bytes + 8));
    auto* host_counts = reinterpret_cast<int64_t*>(pinned);
    std::copy(table.begin(), table.end(), reinterpret_cast<int32_t*>(pinned + count_bytes));
    cuda::copy(bin_of.data, pinned + count_bytes, table_bytes, stream);
    const auto id_bytes = static_cast<size_t>(own_slots) * sizeof(int32_t);
    if (plan.num_tokens < max_tokens) cuda::fill(own_ids.data, 0xff, id_bytes, stream);
    cuda::copy(own_ids.data, call.topk_ids.data,
               static_cast<size_t>(plan.num_tokens * k) * sizeof(int32_t), stream);
    transport.all_gather_rows("exchange routes", own_ids.data, all_ids.data, id_bytes, stream);

    // 2. Stable sorts by bin and by expert; then the lists.
    cuda::dispatch_bins({.all_ids = all_ids.as<int32_t>(),
                         .bin_of = bin_of.as<int32_t>(),
                         .sent = sent.as<int32_t>(),
                         .received_back = received_back.as<int32_t>(),
                         .received = received.as<int32_t>(),
                         .sent_back = sent_back.as<int32_t>(),
                         .num_tokens = max_tokens,
                         .num_experts = config.num_experts,
                         .num_ranks = transport.size(),
                         .top_k = config.routing.top_k,
                         .rank = transport.rank()},
                        stream);
    const auto counts_of = [&](int64_t i) { return slice(counts, i * (bins + 1), bins + 1); };
    cuda::sort_all(
        {.sorts = {sort_of(sent, 0, bins, sorted_sent, place_of_pair, counts_of(0)),
                   sort_of(received_back, 0, bins, sorted_own, slot_to_back, counts_of(1)),
                   sort_of(received, 0, bins, sorted_received, copy_of_token, counts_of(2)),
                   sort_of(sent_back, 0, bins, sorted_back, place_of_back, counts_of(3)),
                   sort_of(all_ids, config.first_expert, width - 1, sorted_rows, row_of_slot,
                           expert_offsets)},
         .count = 5},
        stream);
    cuda::copy(host_counts, counts.data, count_bytes, stream);
    cuda::dispatch_lists({.sorted_sent = sorted_sent.as<int32_t>(),
                          .sorted_rows = sorted_rows.as<int32_t>(),
                          .row_of_slot = row_of_slot.as<int32_t>(),
                          .copy_of_token = copy_of_token.as<int32_t>(),
                          .sorted_sent_back = sorted_back.as<int32_t>(),
                          .expert_offsets = expert_offsets.as<int64_t>(),
                          .sent_tokens = sent_tokens.as<int32_t>(),
                          .sorted_slots = sorted_slots.as<int32_t>(),
                          .back_rows = back_rows.as<int32_t>(),
                          .group_offsets = group_offsets.as<int64_t>(),
                          .num_tokens = max_tokens,
                          .num_ranks = transport.size(),
                          .top_k = config.routing.top_k,
                          .num_groups = places.num_groups(),
                          .num_local_experts = config.num_local_experts},
                         stream);

    // 3. The counts, which decide how much is sent.
    transport.synchronize("read plan", stream);
    RowCounts* const all_counts[] = {&plan.sent, &plan.received_back, &plan.received,
                                     &plan.sent_back};
    for (int64_t i = 0; i < 4; ++i) take_counts(host_counts + i * (bins + 1), *all_counts[i]);
    PlanTensors tensors;
    tensors.sent_tokens = slice(sent_tokens, 0, plan.sent.total());
    tensors.sorted_slots = slice(sorted_slots, 0, plan.sent_back.total());
    tensors.back_rows = slice(back_rows, 0, plan.sent_back.total());
    tensors.slot_to_back = slice(slot_to_back, 0, plan.num_tokens * k);
    for (int64_t g = 0; g < groups; ++g)
        tensors.group_offsets.push_back(slice(group_offsets, g * width, width));
    return tensors;
}

}  // namespace moecore
