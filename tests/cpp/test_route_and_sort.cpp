#include "moecore/route_and_sort.hpp"

#include "moecore/sort_by_expert.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

/// Everything that routing and sorting of T tokens write.
struct Outputs {
    Outputs(int64_t num_tokens, int64_t top_k, int64_t num_local)
        : ids(DType::kInt32, num_tokens * top_k),
          weights(kF32, num_tokens * top_k),
          slots(DType::kInt32, num_tokens * top_k),
          rows(DType::kInt32, num_tokens * top_k),
          offsets(DType::kInt64, num_local + 1),
          shape{num_tokens, top_k} {
        for (Array* array : {&ids, &weights, &slots, &rows, &offsets}) array->fill(77);
    }
    TensorView routed(Array& array) { return array.view({shape[0], shape[1]}); }
    TensorView sorted(Array& array) { return array.view({array.size()}); }

    Array ids, weights, slots, rows, offsets;
    int64_t shape[2];
};

void check_both(const RoutingConfig& config, int64_t num_tokens, int64_t num_experts, int64_t first,
                int64_t num_local) {
    Random random(static_cast<uint32_t>(num_tokens + num_experts));
    Array logits = random.array(kF32, num_tokens * num_experts, 4.0);
    Array bias = random.array(kF32, num_experts);
    const TensorView l = logits.view({num_tokens, num_experts}), b = bias.view({num_experts});
    Outputs got(num_tokens, config.top_k, num_local), want(num_tokens, config.top_k, num_local);
    route_and_sort(l, b, config, first, got.routed(got.ids), got.routed(got.weights),
                   got.sorted(got.slots), got.sorted(got.rows), got.sorted(got.offsets));
    topk_routing(l, b, config, want.routed(want.ids), want.routed(want.weights));
    sort_by_expert(want.routed(want.ids), first, want.sorted(want.slots), want.sorted(want.rows),
                   want.sorted(want.offsets));
    expect(got.ids.bytes() == want.ids.bytes(), "ids");
    expect(got.weights.bytes() == want.weights.bytes(), "weights");
    expect(got.slots.bytes() == want.slots.bytes(), "sorted_slots");
    expect(got.rows.bytes() == want.rows.bytes(), "slot_to_row");
    expect(got.offsets.bytes() == want.offsets.bytes(), "expert_offsets");
}

void test_both_is_one_after_the_other() {
    const RoutingConfig sigmoid{.top_k = 3, .score_function = ScoreFunction::kSigmoid};
    for (const int64_t num_tokens : {0, 1, 7, 100}) {
        check_both({.top_k = 2}, num_tokens, 8, 0, 8);
        check_both(sigmoid, num_tokens, 64, 16, 16);
        check_both({.top_k = 32}, num_tokens, 1024, 1000, 24);
    }
}

void test_both_names_the_bad_argument() {
    Array logits(kF32, 24), bias(kF32, 8);
    Outputs out(3, 2, 8);
    const TensorView l = logits.view({3, 8}), s = out.sorted(out.slots);
    const auto bad = [&](TensorView l, int64_t first, TensorView s, const char* text,
                         std::source_location where = std::source_location::current()) {
        expect_invalid(
            [&] {
                route_and_sort(l, bias.view({8}), {.top_k = 2}, first, out.routed(out.ids),
                               out.routed(out.weights), s, out.sorted(out.rows),
                               out.sorted(out.offsets));
            },
            std::string("route_and_sort: ") + text, where);
    };
    bad(logits.view({24}), 0, s, "router_logits must");
    bad(logits.view({24, 1}), 0, s, "top_k must");
    bad(l, 0, out.sorted(out.offsets), "sorted_slots must");
    bad(l, -1, s, "first_expert must");
    bad(l, 1, s, "first_expert and expert_offsets must give a range within the 8 experts");
    bad(l, 0, TensorView(logits.data(), DType::kInt32, {6}),
        "sorted_slots must not overlap router_logits");
    bad(l, 0, TensorView(bias.data(), DType::kInt32, {6}),
        "sorted_slots must not overlap selection_bias");
    bad(l, 0, TensorView(out.weights.data(), DType::kInt32, {6}),
        "sorted_slots must not overlap topk_weights");
}

}  // namespace

void add_route_and_sort_tests(std::vector<Test>& tests) {
    tests.insert(tests.end(), {{"both_is_one_after_the_other", test_both_is_one_after_the_other},
                               {"both_names_the_bad_argument", test_both_names_the_bad_argument}});
}

}  // namespace moecore::test
