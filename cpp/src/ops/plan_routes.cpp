#include "moecore/plan_routes.hpp"

#include <limits>
#include <vector>

#include "moecore/kernels/memory.hpp"
#include "moecore/kernels/plan_routes.hpp"
#include "ops/check.hpp"

namespace moecore {
namespace {

struct Named {
    const char* name;
    const TensorView& view;
    DType dtype;
};

/// `outputs` overlap neither each other nor `inputs`; all are contiguous on one device.
void check_tensors(const Check& check, const std::vector<Named>& inputs,
                   const std::vector<Named>& outputs) {
    const Device device = inputs[0].view.device;
    for (const auto& list : {inputs, outputs})
        for (const Named& one : list) {
            check.dtype(one.name, one.view, {one.dtype});
            check.contiguous(one.name, one.view);
            check.device(one.name, one.view, device);
        }
    for (const Named& output : outputs) {
        for (const Named& input : inputs)
            check.no_overlap(output.name, output.view, input.name, input.view);
        for (const Named& other : outputs)
            if (&other != &output)
                check.no_overlap(output.name, output.view, other.name, other.view);
    }
}

}  // namespace

void key_routes(const TensorView& all_ids, const TensorView& places, int rank,
                const RouteKeys& keys, Stream stream) {
    const Check check("key_routes");
    check.shape("all_ids", all_ids, {Check::kAny, Check::kAny, Check::kAny});
    check.shape("places", places, {Check::kAny});
    const int64_t ranks = all_ids.shape[0], tokens = all_ids.shape[1], top_k = all_ids.shape[2];
    check.that(all_ids.num_elements() <= std::numeric_limits<int32_t>::max(),
               "all_ids must have at most 2^31 - 1 entries, got ", all_ids.num_elements());
    check.that(rank >= 0 && rank < ranks, "rank must be in [0, P), got ", rank, " with P ", ranks);
    check.shape("sent_keys", keys.sent, {Check::kAny, ranks});
    const int64_t own = keys.sent.shape[0];
    check.that(own <= tokens, "sent_keys must have at most F = ", tokens, " rows, got ", own);
    check.shape("received_back_keys", keys.received_back, {own, top_k});
    check.shape("received_keys", keys.received, {ranks, tokens});
    check.shape("sent_back_keys", keys.sent_back, {ranks, tokens, top_k});
    constexpr DType kInt = DType::kInt32;
    check_tensors(check, {{"all_ids", all_ids, kInt}, {"places", places, kInt}},
                  {{"sent_keys", keys.sent, kInt},
                   {"received_back_keys", keys.received_back, kInt},
                   {"received_keys", keys.received, kInt},
                   {"sent_back_keys", keys.sent_back, kInt}});
    const KeyRoutesArgs args{
        .all_ids = all_ids.as<int32_t>(),
        .places = places.as<int32_t>(),
        .sent_keys = keys.sent.as<int32_t>(),
        .received_back_keys = keys.received_back.as<int32_t>(),
        .received_keys = keys.received.as<int32_t>(),
        .sent_back_keys = keys.sent_back.as<int32_t>(),
        .tokens_per_rank = tokens,
        .num_tokens = own,
        .num_ranks = static_cast<int>(ranks),
        .rank = rank,
        .num_experts = static_cast<int>(places.shape[0]),
        .top_k = static_cast<int>(top_k),
    };
    switch (all_ids.device.type) {
        case DeviceType::kCpu:
            return cpu::key_routes(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(all_ids.device.index);
            return cuda::key_routes(args, stream);
        }
    }
}

void place_rows(const RowOrders& orders, const PlacedRows& rows, Stream stream) {
    const Check check("place_rows");
    check.shape("row_slots", orders.row_slots, {Check::kAny});
    const int64_t slots = orders.row_slots.shape[0];
    check.shape("slot_rows", orders.slot_rows, {slots});
    check.shape("back_slots", orders.back_slots, {slots});
    check.shape("sent_items", orders.sent_items, {Check::kAny, Check::kAny});
    const int64_t own = orders.sent_items.shape[0], ranks = orders.sent_items.shape[1];
    check.shape("token_copies", orders.token_copies, {ranks, Check::kAny});
    const int64_t tokens = orders.token_copies.num_elements();
    check.that(tokens == 0 ? slots == 0 : slots % tokens == 0,
               "row_slots must have k entries a token, got ", slots, " with ", tokens, " tokens");
    check.shape("expert_offsets", orders.expert_offsets, {Check::kAny});
    const int64_t width = orders.expert_offsets.shape[0];
    check.that(width >= 1, "expert_offsets must not be empty, got 0 entries");
    check.shape("sorted_slots", rows.sorted_slots, {slots});
    check.shape("back_rows", rows.back_rows, {slots});
    check.shape("sent_tokens", rows.sent_tokens, {own, ranks});
    check.shape("group_offsets", rows.group_offsets, {Check::kAny, width});
    constexpr DType kInt = DType::kInt32, kLong = DType::kInt64;
    std::vector<Named> inputs = {{"row_slots", orders.row_slots, kInt},
                                 {"slot_rows", orders.slot_rows, kInt},
                                 {"token_copies", orders.token_copies, kInt},
                                 {"back_slots", orders.back_slots, kInt},
                                 {"sent_items", orders.sent_items, kInt},
                                 {"expert_offsets", orders.expert_offsets, kLong}};
    std::vector<Named> outputs = {{"sorted_slots", rows.sorted_slots, kInt},
                                  {"back_rows", rows.back_rows, kInt},
                                  {"sent_tokens", rows.sent_tokens, kInt},
                                  {"group_offsets", rows.group_offsets, kLong}};
    const bool has_weights = orders.all_weights.defined();
    if (has_weights) {
        constexpr DType kFloat = DType::kFloat32;
        check.that(orders.all_weights.num_elements() == slots,
                   "all_weights must have an entry a slot, ", slots, ", got ", orders.all_weights);
        check.shape("copy_rows", rows.copy_rows, {slots});
        check.shape("copy_weights", rows.copy_weights, {slots});
        check.shape("ones", rows.ones, {own, ranks});
        inputs.push_back({"all_weights", orders.all_weights, kFloat});
        outputs.push_back({"copy_rows", rows.copy_rows, kInt});
        outputs.push_back({"copy_weights", rows.copy_weights, kFloat});
        outputs.push_back({"ones", rows.ones, kFloat});
    }
    check_tensors(check, inputs, outputs);
    const PlaceRowsArgs args{
        .row_slots = orders.row_slots.as<int32_t>(),
        .slot_rows = orders.slot_rows.as<int32_t>(),
        .token_copies = orders.token_copies.as<int32_t>(),
        .back_slots = orders.back_slots.as<int32_t>(),
        .sent_items = orders.sent_items.as<int32_t>(),
        .expert_offsets = orders.expert_offsets.as<int64_t>(),
        .all_weights = has_weights ? orders.all_weights.as<float>() : nullptr,
        .sorted_slots = rows.sorted_slots.as<int32_t>(),
        .back_rows = rows.back_rows.as<int32_t>(),
        .sent_tokens = rows.sent_tokens.as<int32_t>(),
        .group_offsets = rows.group_offsets.as<int64_t>(),
        .copy_rows = rows.copy_rows.as<int32_t>(),
        .copy_weights = rows.copy_weights.as<float>(),
        .ones = rows.ones.as<float>(),
        .num_slots = slots,
        .num_items = own * ranks,
        .top_k = tokens == 0 ? 1 : static_cast<int>(slots / tokens),
        .num_ranks = static_cast<int>(ranks),
        .num_groups = static_cast<int>(rows.group_offsets.shape[0]),
        .num_local_experts = static_cast<int>(width - 1),
    };
    switch (orders.row_slots.device.type) {
        case DeviceType::kCpu:
            return cpu::place_rows(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(orders.row_slots.device.index);
            return cuda::place_rows(args, stream);
        }
    }
}

}  // namespace moecore
