#include <algorithm>
#include <map>
#include <set>

#include "moecore/dispatcher.hpp"
#include "moecore/ep_schedule.hpp"
#include "moecore/plan_routes.hpp"
#include "moecore/threads.hpp"
#include "runtime/plan_on_device.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

struct Group {
    int num_ranks, num_experts, top_k, num_groups;
    std::vector<ExpertRange> ranges;
    std::vector<std::vector<int32_t>> ids;

    Group(int ranks, int experts, int k, int groups, const std::vector<int64_t>& tokens,
          uint32_t seed)
        : num_ranks(ranks), num_experts(experts), top_k(k), num_groups(groups) {
        Random random(seed);
        for (int r = 0; r < ranks; ++r) {
            ranges.push_back(expert_range(experts, r, ranks));
            std::vector<int32_t> own;
            for (int64_t i = 0; i < tokens[static_cast<size_t>(r)] * k; ++i)
                own.push_back(
                    static_cast<int32_t>(random.below(experts + 2) - 1));  // some nobody's
            ids.push_back(own);
        }
    }

    std::vector<DispatchPlan> plans() const {
        const ExpertPlaces places(ranges, num_groups);
        std::vector<std::span<const int32_t>> all(ids.begin(), ids.end());
        std::vector<DispatchPlan> result;
        for (int r = 0; r < num_ranks; ++r)
            result.push_back(make_dispatch_plan(places, r, top_k, all));
        return result;
    }
};

/// Where the rows that `source` sends `target` in `group` begin, among all that `counts` counts.
int64_t first_of(const RowCounts& counts, int group, int rank) {
    int64_t first = counts.before(group);
    for (int r = 0; r < rank; ++r) first += counts.of_group(group)[static_cast<size_t>(r)];
    return first;
}

/// Carries made-up rows through all plans, and checks every promise of DispatchPlan.
void check(const Group& group) {
    const std::vector<DispatchPlan> plans = group.plans();
    using Token = std::pair<int, int32_t>;  // source rank, token
    std::vector<std::vector<Token>> copies(plans.size());
    std::vector<std::vector<std::pair<Token, int>>> rows(plans.size()), back(plans.size());

    for (size_t r = 0; r < plans.size(); ++r)
        copies[r].resize(static_cast<size_t>(plans[r].received.total()), {-1, -1});
    for (int g = 0; g < group.num_groups; ++g)
        for (int s = 0; s < group.num_ranks; ++s)
            for (int d = 0; d < group.num_ranks; ++d) {
                const DispatchPlan& from = plans[static_cast<size_t>(s)];
                const DispatchPlan& to = plans[static_cast<size_t>(d)];
                const int64_t count = from.sent.of_group(g)[static_cast<size_t>(d)];
                expect(count == to.received.of_group(g)[static_cast<size_t>(s)],
                       "both sides count the same copies");
                expect(from.received_back.of_group(g)[static_cast<size_t>(d)] ==
                           to.sent_back.of_group(g)[static_cast<size_t>(s)],
                       "both sides count the same results");
                for (int64_t i = 0; i < count; ++i) {
                    const int32_t token =
                        from.sent_tokens[static_cast<size_t>(first_of(from.sent, g, d) + i)];
                    copies[static_cast<size_t>(d)]
                          [static_cast<size_t>(first_of(to.received, g, s) + i)] = {s, token};
                }
            }

    for (size_t r = 0; r < plans.size(); ++r) {
        const DispatchPlan& plan = plans[r];
        std::set<Token> distinct(copies[r].begin(), copies[r].end());
        expect(distinct.size() == copies[r].size(), "one copy of a token a rank");
        const ExpertRange range = group.ranges[r];
        expect(plan.expert_offsets.size() == static_cast<size_t>(range.count) + 1 &&
                   plan.expert_offsets.back() == static_cast<int64_t>(plan.sorted_slots.size()),
               "offsets end at the number of rows");
        for (int e = 0; e < range.count; ++e) {
            Token last{-1, -1};
            for (int64_t row = plan.expert_offsets[static_cast<size_t>(e)];
                 row < plan.expert_offsets[static_cast<size_t>(e) + 1]; ++row) {
                const int32_t slot = plan.sorted_slots[static_cast<size_t>(row)];
                const Token token = copies[r][static_cast<size_t>(slot / group.top_k)];
                const int j = slot % group.top_k;
                const auto& ids = group.ids[static_cast<size_t>(token.first)];
                expect(ids[static_cast<size_t>(token.second * group.top_k + j)] == range.first + e,
                       "a row is of its expert");
                expect(token >= last, "rows come by source rank and token");
                last = token;
                rows[r].push_back({token, j});
            }
        }
        back[r].resize(static_cast<size_t>(plan.received_back.total()));
    }

    for (int g = 0; g < group.num_groups; ++g)
        for (int s = 0; s < group.num_ranks; ++s)
            for (int d = 0; d < group.num_ranks; ++d) {
                const DispatchPlan& owner = plans[static_cast<size_t>(s)];
                const DispatchPlan& host = plans[static_cast<size_t>(d)];
                const int64_t count = host.sent_back.of_group(g)[static_cast<size_t>(s)];
                for (int64_t i = 0; i < count; ++i) {
                    const auto row = static_cast<size_t>(
                        host.back_rows[static_cast<size_t>(first_of(host.sent_back, g, s) + i)]);
                    back[static_cast<size_t>(s)]
                        [static_cast<size_t>(first_of(owner.received_back, g, d) + i)] =
                            rows[static_cast<size_t>(d)][row];
                }
            }
    for (int r = 0; r < group.num_ranks; ++r) {
        const auto& ids = group.ids[static_cast<size_t>(r)];
        for (size_t slot = 0; slot < ids.size(); ++slot) {
            const int32_t at = plans[static_cast<size_t>(r)].slot_to_back[slot];
            const bool is_routed = ids[slot] >= 0 && ids[slot] < group.num_experts;
            expect((at >= 0) == is_routed, "a slot has a result if an expert has its id");
            if (at < 0) continue;
            const auto k = static_cast<size_t>(group.top_k);
            const auto wanted =
                std::pair(Token{r, static_cast<int32_t>(slot / k)}, static_cast<int>(slot % k));
            expect(back[static_cast<size_t>(r)][static_cast<size_t>(at)] == wanted,
                   "each result comes back to its slot");
        }
    }
}

void plans_of_all_ranks_fit_together() {
    check(Group(1, 4, 2, 1, {5}, 1));
    check(Group(2, 4, 2, 1, {5, 3}, 2));
    check(Group(3, 7, 3, 2, {4, 0, 9}, 3));     // experts not divisible, an idle rank
    check(Group(4, 5, 1, 4, {1, 2, 3, 4}, 4));  // groups without an expert
    check(Group(8, 64, 8, 3, {0, 0, 0, 17, 0, 1, 0, 2}, 5));
    check(Group(5, 5, 5, 1, {0, 0, 0, 0, 0}, 6));
    // Many tokens are planned by several threads.
    set_num_threads(4);
    check(Group(3, 16, 2, 2, {9000, 0, 12000}, 7));
}

template <typename T>
std::vector<T> values_of(const TensorView& view) {
    const T* data = view.as<T>();
    return {data, data + view.num_elements()};
}

/// The plan made by sorts, which a device can make, against the one made by the host.
void check_sorted_plan(const Group& group, bool with_weights) {
    const std::vector<DispatchPlan> wanted = group.plans();
    const ExpertPlaces places(group.ranges, group.num_groups);
    const auto transports = make_in_process_transports(group.num_ranks);
    size_t longest = 0;
    for (const auto& own : group.ids) longest = std::max(longest, own.size());
    std::vector<int32_t> all;
    for (const auto& own : group.ids) {
        all.insert(all.end(), own.begin(), own.end());
        all.insert(all.end(), longest - own.size(), -1);
    }
    const TensorView all_ids(
        all.data(), DType::kInt32,
        {group.num_ranks, static_cast<int64_t>(longest) / group.top_k, group.top_k});
    // Every route's weight is its place among all.
    std::vector<float> numbers(all.size());
    std::iota(numbers.begin(), numbers.end(), 0.0f);
    const TensorView all_weights(numbers.data(), DType::kFloat32,
                                 {all_ids.shape[0], all_ids.shape[1], all_ids.shape[2]});
    std::vector<std::span<const float>> weights_of_ranks;
    for (size_t r = 0; r < group.ids.size(); ++r)
        weights_of_ranks.emplace_back(numbers.data() + r * longest, group.ids[r].size());
    for (size_t r = 0; r < wanted.size(); ++r) {
        DevicePlanStorage storage(Device{});
        PlanTensors tensors;
        const int64_t num_tokens = wanted[r].num_tokens;
        const TensorView weights = with_weights ? all_weights : TensorView();
        const DispatchPlan plan = plan_on_device(*transports[r], places, all_ids, weights,
                                                 num_tokens, storage, tensors, {});
        expect(plan.sent.counts == wanted[r].sent.counts, "copies sent");
        expect(plan.received.counts == wanted[r].received.counts, "copies received");
        expect(plan.sent_back.counts == wanted[r].sent_back.counts, "results sent");
        expect(plan.received_back.counts == wanted[r].received_back.counts, "results received");
        expect(values_of<int32_t>(tensors.sent_tokens) == wanted[r].sent_tokens, "sent_tokens");
        expect(values_of<int32_t>(tensors.sorted_slots) == wanted[r].sorted_slots, "sorted_slots");
        expect(values_of<int32_t>(tensors.back_rows) == wanted[r].back_rows, "back_rows");
        expect(values_of<int32_t>(tensors.slot_to_back) == wanted[r].slot_to_back, "slot_to_back");
        for (int g = 0; g < group.num_groups; ++g) {
            const auto& offsets = wanted[r].expert_offsets;
            const auto bound = [&](int at) {
                return offsets[static_cast<size_t>(places.group_begin(static_cast<int>(r), at))];
            };
            std::vector<int64_t> of_group;
            for (const int64_t offset : offsets)
                of_group.push_back(std::clamp(offset, bound(g), bound(g + 1)));
            expect(values_of<int64_t>(tensors.group_offsets[static_cast<size_t>(g)]) == of_group,
                   "offsets of a group");
        }
        if (!with_weights) continue;
        const FastReturn fast(wanted[r], group.top_k, weights_of_ranks);
        expect(values_of<int32_t>(tensors.copy_slot_to_row) == fast.copy_slot_to_row,
               "rows of copies");
        expect(values_of<float>(tensors.copy_weights) == fast.copy_weights, "weights of copies");
        expect(values_of<int32_t>(tensors.slot_to_partial) == fast.slot_to_partial,
               "where partial sums arrive");
        expect(values_of<float>(tensors.ones) == fast.ones, "ones");
    }
}

void a_plan_by_sorts_is_the_hosts() {
    for (const bool with_weights : {false, true}) {
        check_sorted_plan(Group(1, 4, 2, 1, {5}, 1), with_weights);
        check_sorted_plan(Group(2, 4, 2, 1, {5, 3}, 2), with_weights);
        check_sorted_plan(Group(3, 7, 3, 2, {4, 0, 9}, 3), with_weights);
        check_sorted_plan(Group(4, 5, 1, 4, {1, 2, 3, 4}, 4), with_weights);
        check_sorted_plan(Group(8, 64, 8, 3, {0, 0, 0, 17, 0, 1, 0, 2}, 5), with_weights);
        check_sorted_plan(Group(5, 5, 5, 1, {0, 0, 0, 0, 0}, 6), with_weights);
        check_sorted_plan(Group(3, 16, 2, 4, {900, 0, 1200}, 7), with_weights);
    }
}

void plan_routes_checks_its_arguments() {
    Array ids = int_array(DType::kInt32, {0, 1, 2, 3}), places = int_array(DType::kInt32, {0, 1});
    Array sent(DType::kInt32, 4), back(DType::kInt32, 2), received(DType::kInt32, 2),
        sent_back(DType::kInt32, 4);
    const auto call = [&](int rank, TensorView own) {
        key_routes(ids.view({2, 1, 2}), places.view({2}), rank,
                   {own, back.view({1, 2}), received.view({2, 1}), sent_back.view({2, 1, 2})});
    };
    expect_invalid([&] { call(2, sent.view({1, 2})); },
                   "key_routes: rank must be in [0, P), got 2 with P 2");
    expect_invalid([&] { call(0, sent.view({2, 2})); }, "sent_keys must have at most F = 1 rows");
    expect_invalid([&] { call(0, on_other_device(sent.view({1, 2}))); }, "sent_keys");
    Array slots(DType::kInt32, 3), offsets(DType::kInt64, 2);
    expect_invalid(
        [&] {
            place_rows({slots.view({3}), slots.view({3}), received.view({2, 1}), slots.view({3}),
                        sent.view({1, 2}), offsets.view({2})},
                       {});
        },
        "row_slots must have k entries a token, got 3 with 2 tokens");
    Array four(DType::kInt32, 4), rows(DType::kInt32, 4), weights(DType::kFloat32, 5),
        copies(DType::kFloat32, 4), group(DType::kInt64, 2),
        others[3] = {{DType::kInt32, 4}, {DType::kInt32, 4}, sent_back};
    const auto add_weights = [&](TensorView all_weights, TensorView copy_weights) {
        place_rows({four.view({4}), rows.view({4}), received.view({2, 1}), ids.view({4}),
                    sent.view({1, 2}), offsets.view({2}), all_weights},
                   {others[0].view({4}),
                    others[1].view({4}),
                    back.view({1, 2}),
                    group.view({1, 2}),
                    others[2].view({4}),
                    copy_weights,
                    {}});
    };
    expect_invalid([&] { add_weights(weights.view({5}), {}); },
                   "all_weights must have an entry a slot, 4, got");
    expect_invalid([&] { add_weights(weights.view({4}), weights.view({5})); }, "copy_weights");
    expect_invalid([&] { add_weights(weights.view({4}), weights.view({4})); }, "ones");
    const TensorView on_sorted(others[0].data(), DType::kFloat32, {1, 2});
    expect_invalid(
        [&] {
            place_rows({four.view({4}), rows.view({4}), received.view({2, 1}), ids.view({4}),
                        sent.view({1, 2}), offsets.view({2}), weights.view({4})},
                       {others[0].view({4}), others[1].view({4}), back.view({1, 2}),
                        group.view({1, 2}), others[2].view({4}), copies.view({4}), on_sorted});
        },
        "sorted_slots must not overlap ones");
}

void expert_ranges_cover_all_experts() {
    for (const int size : {1, 2, 3, 7, 10}) {
        int next = 0;
        for (int r = 0; r < size; ++r) {
            const ExpertRange range = expert_range(10, r, size);
            expect(range.first == next && range.count >= 10 / size, "contiguous and balanced");
            next += range.count;
        }
        expect(next == 10, "all of them");
    }
    expect_invalid([] { expert_range(3, 0, 4); },
                   "expert_range: size must be <= num_experts, got 4 with 3 experts");
    expect_invalid([] { expert_range(3, 2, 2); }, "rank must be in [0, size), got 2");
}

}  // namespace

void add_dispatch_plan_tests(std::vector<Test>& tests) {
    tests.push_back({"plans of all ranks fit together", plans_of_all_ranks_fit_together});
    tests.push_back({"a plan by sorts is the host's", a_plan_by_sorts_is_the_hosts});
    tests.push_back({"plan_routes arguments", plan_routes_checks_its_arguments});
    tests.push_back({"expert ranges cover all experts", expert_ranges_cover_all_experts});
}

}  // namespace moecore::test
