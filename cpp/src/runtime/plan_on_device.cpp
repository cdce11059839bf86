#include "runtime/plan_on_device.hpp"

#include <array>

#include "moecore/kernels/memory.hpp"
#include "moecore/plan_routes.hpp"
#include "moecore/sort_by_expert.hpp"
#include "moecore/topk_routing.hpp"
#include "runtime/take_all.hpp"

namespace moecore {
namespace {

bool same_ranges(const std::vector<ExpertRange>& a, const ExpertPlaces& places) {
    if (static_cast<int>(a.size()) != places.num_ranks()) return false;
    for (size_t r = 0; r < a.size(); ++r)
        if (a[r].count != places.num_local(static_cast<int>(r))) return false;
    return true;
}

/// Uploads group * P + owner of each expert, unless `storage` holds it already.
void place_experts(const ExpertPlaces& places, DevicePlanStorage& storage, Stream stream) {
    if (storage.num_groups == places.num_groups() && same_ranges(storage.ranges, places)) return;
    storage.ranges.clear();
    int total = 0;
    for (int r = 0; r < places.num_ranks(); ++r) {
        storage.ranges.push_back({total, places.num_local(r)});
        total += places.num_local(r);
    }
    storage.num_groups = places.num_groups();
    take_all(storage.places, {{&storage.places_view, DType::kInt32, total}});
    const size_t bytes = static_cast<size_t>(total) * sizeof(int32_t);
    const bool is_on_host = storage.places.device().type == DeviceType::kCpu;
    int32_t* table = is_on_host ? storage.places_view.as<int32_t>()
                                : static_cast<int32_t*>(storage.pinned.reserve(bytes));
    for (int e = 0; e < total; ++e) {
        const ExpertPlaces::Place place = places.of(e);
        table[e] = place.group * places.num_ranks() + place.owner;
    }
    // plan_on_device waits for the stream before it uses the pinned memory again.
    if (!is_on_host) cuda::copy(storage.places_view.data, table, bytes, stream);
}

/// Keys of one kind, and their order.
struct Sorted {
    TensorView keys, items, positions;
    TensorView offsets;  ///< [bins + 1], among those of all kinds

    SortProblem problem() const {
        return {
            .topk_ids = TensorView(keys.data, DType::kInt32, {keys.num_elements(), 1}, keys.device),
            .first_expert = 0,
            .sorted_slots = items,
            .slot_to_row = positions,
            .expert_offsets = offsets};
    }
};

TensorView shaped(const TensorView& view, std::initializer_list<int64_t> shape) {
    return TensorView(view.data, view.dtype, shape, view.device);
}

void read_counts(const int64_t* offsets, RowCounts& counts) {
    for (size_t i = 0; i < counts.counts.size(); ++i)
        counts.counts[i] = offsets[i + 1] - offsets[i];
}

}  // namespace

bool can_plan_on_device(const ExpertPlaces& places) {
    return int64_t{places.num_ranks()} * places.num_groups() <= kMaxExperts;
}

DispatchPlan plan_on_device(Transport& transport, const ExpertPlaces& places,
                            const TensorView& all_ids, const TensorView& all_weights,
                            int64_t num_tokens, DevicePlanStorage& storage, PlanTensors& tensors,
                            Stream stream) {
    const int rank = transport.rank();
    const int64_t ranks = all_ids.shape[0], tokens = all_ids.shape[1], top_k = all_ids.shape[2];
    const int64_t slots = all_ids.num_elements(), groups = places.num_groups();
    const int64_t bins = groups * ranks, width = places.num_local(rank) + 1;
    const bool with_weights = all_weights.defined();
    const int64_t added_slots = with_weights ? slots : 0;
    const bool is_on_host = all_ids.device.type == DeviceType::kCpu;
    place_experts(places, storage, stream);

    Sorted sent, received_back, received, sent_back;
    TensorView counts, row_slots, slot_rows, offsets;
    PlacedRows rows;
    constexpr DType kInt = DType::kInt32, kLong = DType::kInt64;
    take_all(storage.memory, {{&sent.keys, kInt, num_tokens * ranks},
                              {&sent.items, kInt, num_tokens * ranks},
                              {&sent.positions, kInt, num_tokens * ranks},
                              {&received_back.keys, kInt, num_tokens * top_k},
                              {&received_back.items, kInt, num_tokens * top_k},
                              {&received_back.positions, kInt, num_tokens * top_k},
                              {&received.keys, kInt, ranks * tokens},
                              {&received.items, kInt, ranks * tokens},
                              {&received.positions, kInt, ranks * tokens},
                              {&sent_back.keys, kInt, slots},
                              {&sent_back.items, kInt, slots},
                              {&sent_back.positions, kInt, slots},
                              {&counts, kLong, 4, bins + 1},
                              {&row_slots, kInt, slots},
                              {&slot_rows, kInt, slots},
                              {&offsets, kLong, width},
                              {&rows.sorted_slots, kInt, slots},
                              {&rows.back_rows, kInt, slots},
                              {&rows.sent_tokens, kInt, num_tokens, ranks},
                              {&rows.group_offsets, kLong, groups, width},
                              {&rows.copy_rows, kInt, added_slots},
                              {&rows.copy_weights, DType::kFloat32, added_slots},
                              {&rows.ones, DType::kFloat32, with_weights ? num_tokens : 0, ranks}});
    Sorted* const kinds[] = {&sent, &received_back, &received, &sent_back};
    key_routes(all_ids, storage.places_view, rank,
               {.sent = shaped(sent.keys, {num_tokens, ranks}),
                .received_back = shaped(received_back.keys, {num_tokens, top_k}),
                .received = shaped(received.keys, {ranks, tokens}),
                .sent_back = shaped(sent_back.keys, {ranks, tokens, top_k})},
               stream);
    // The four kinds, and the rows of this rank's experts.
    std::array<SortProblem, 5> problems;
    for (int64_t i = 0; i < 4; ++i) {
        kinds[i]->offsets = shaped(slice(counts, i, 1), {bins + 1});
        problems[static_cast<size_t>(i)] = kinds[i]->problem();
    }
    problems[4] = {.topk_ids = shaped(all_ids, {ranks * tokens, top_k}),
                   .first_expert = storage.ranges[static_cast<size_t>(rank)].first,
                   .sorted_slots = row_slots,
                   .slot_to_row = slot_rows,
                   .expert_offsets = offsets};
    sort_by_expert(problems, stream);
    const size_t bytes = static_cast<size_t>(counts.num_elements()) * sizeof(int64_t);
    const int64_t* host = counts.as<int64_t>();
    if (!is_on_host) {
        void* pinned = storage.pinned.reserve(bytes);
        cuda::copy(pinned, counts.data, bytes, stream);
        host = static_cast<const int64_t*>(pinned);
    }
    transport.synchronize("read counts", stream);

    // The host knows what travels; the device goes on with where it goes.
    place_rows({.row_slots = row_slots,
                .slot_rows = slot_rows,
                .token_copies = shaped(received.positions, {ranks, tokens}),
                .back_slots = sent_back.items,
                .sent_items = shaped(sent.items, {num_tokens, ranks}),
                .expert_offsets = offsets,
                .all_weights = all_weights},
               rows, stream);

    DispatchPlan plan(static_cast<int>(groups), static_cast<int>(ranks));
    plan.num_tokens = num_tokens;
    RowCounts* const all_counts[] = {&plan.sent, &plan.received_back, &plan.received,
                                     &plan.sent_back};
    for (int64_t i = 0; i < 4; ++i) read_counts(host + i * (bins + 1), *all_counts[i]);
    tensors.sent_tokens = shaped(rows.sent_tokens, {plan.sent.total()});
    tensors.sorted_slots = slice(rows.sorted_slots, 0, plan.sent_back.total());
    tensors.back_rows = slice(rows.back_rows, 0, plan.sent_back.total());
    tensors.slot_to_back = received_back.positions;
    if (with_weights) {
        const int64_t copies = plan.received.total();
        tensors.copy_slot_to_row = slice(rows.copy_rows, 0, copies * top_k);
        tensors.copy_weights = shaped(rows.copy_weights, {copies, top_k});
        tensors.slot_to_partial = sent.positions;
        tensors.ones = rows.ones;
    }
    for (int64_t g = 0; g < groups; ++g)
        tensors.group_offsets.push_back(shaped(slice(rows.group_offsets, g, 1), {width}));
    return plan;
}

}  // namespace moecore
