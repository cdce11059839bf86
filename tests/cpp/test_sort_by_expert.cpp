#include <limits>

#include "moecore/sort_by_expert.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

void check_sort(const std::vector<int64_t>& ids, int64_t top_k, int64_t first, int64_t num_local) {
    const auto num_slots = static_cast<int64_t>(ids.size());
    Array id_array = int_array(DType::kInt32, ids);
    Array slots(DType::kInt32, num_slots), rows(DType::kInt32, num_slots);
    Array offsets(DType::kInt64, num_local + 1);
    slots.fill(77);
    rows.fill(77);
    offsets.fill(77);
    sort_by_expert(id_array.view({num_slots / top_k, top_k}), first, slots.view({num_slots}),
                   rows.view({num_slots}), offsets.view({num_local + 1}));
    int64_t row = 0;
    std::vector<int64_t> slot_to_row(ids.size(), -1);
    for (int64_t e = 0; e < num_local; ++e) {
        expect(offsets[e] == static_cast<double>(row), concat("offset of expert ", e));
        for (int64_t slot = 0; slot < num_slots; ++slot) {
            if (ids[static_cast<size_t>(slot)] != first + e) continue;
            expect(slots[row] == static_cast<double>(slot), concat("slot of row ", row));
            slot_to_row[static_cast<size_t>(slot)] = row++;
        }
    }
    expect(offsets[num_local] == static_cast<double>(row), "last offset is R");
    for (int64_t r = row; r < num_slots; ++r) expect(slots[r] == -1, "rows past R are -1");
    for (int64_t s = 0; s < num_slots; ++s)
        expect(rows[s] == static_cast<double>(slot_to_row[static_cast<size_t>(s)]),
               concat("row of slot ", s));
}

void test_sort_matches_a_naive_sort() {
    check_sort({}, 1, 0, 1);
    check_sort({}, 8, 3, 1024);
    check_sort({4}, 1, 0, 5);
    check_sort({4}, 1, 5, 5);
    check_sort({7, 7, 7, 7}, 2, 7, 1);
    check_sort({-1, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max(), 3}, 2,
               2, 2);
    Random random(5);
    for (const int64_t num_experts : {1, 8, 129, 1024})
        for (const int64_t num_tokens : {1, 3, 64, 1000}) {
            std::vector<int64_t> ids;
            for (int64_t i = 0; i < num_tokens * 3; ++i)
                ids.push_back(random.below(num_experts + 2) - 1);
            check_sort(ids, 3, 0, num_experts);
            check_sort(ids, 3, num_experts / 3, num_experts / 2 + 1);
        }
}

void test_sort_names_the_bad_argument() {
    Array ids(DType::kInt32, 6), slots(DType::kInt32, 6), rows(DType::kInt32, 6),
        offsets(DType::kInt64, 5);
    const TensorView i = ids.view({3, 2}), s = slots.view({6}), r = rows.view({6}),
                     o = offsets.view({5});
    const auto bad = [](TensorView i, int64_t first, TensorView s, TensorView r, TensorView o,
                        const char* text,
                        std::source_location where = std::source_location::current()) {
        expect_invalid([&] { sort_by_expert(i, first, s, r, o); },
                       std::string("sort_by_expert: ") + text, where);
    };
    TensorView negative = i, reversed = s;
    negative.strides[0] = -2;
    reversed.strides[0] = -1;
    bad({}, 0, s, r, o, "topk_ids must");
    bad(negative, 0, s, r, o, "topk_ids must");
    bad(ids.view({6}), 0, s, r, o, "topk_ids must");
    bad(on_other_device(i), 0, s, r, o, "sorted_slots must");
    bad(i, -1, s, r, o, "first_expert must");
    bad(i, 0, reversed, r, o, "sorted_slots must");
    bad(i, 0, slots.view({5}), r, o, "sorted_slots must");
    bad(i, 0, s, on_other_device(r), o, "slot_to_row must");
    bad(i, 0, s, o, o, "slot_to_row must");
    bad(i, 0, s, r, on_other_device(o), "expert_offsets must");
    bad(i, 0, s, r, offsets.view({1}), "num_local_experts must");
    bad(i, 0, s, s, o, "sorted_slots must not overlap slot_to_row");
    bad(i, 0, s, ids.view({6}), o, "slot_to_row must not overlap topk_ids");
    bad(i, 0, s, r, TensorView(slots.data(), DType::kInt64, {3}),
        "sorted_slots must not overlap expert_offsets");
}

void test_several_sorts_are_those_alone() {
    struct Sort {
        int64_t num_tokens, first, num_local;
    };
    const Sort sorts[] = {{40, 0, 7}, {0, 3, 2}, {700, 2, 3}};
    Random random(6);
    std::vector<Array> arrays;
    std::vector<SortProblem> problems;
    for (const Sort& sort : sorts) {
        const int64_t slots = sort.num_tokens * 2;
        std::vector<int64_t> ids;
        for (int64_t i = 0; i < slots; ++i) ids.push_back(random.below(9) - 1);
        arrays.push_back(int_array(DType::kInt32, ids));
        SortProblem problem{arrays.back().view({sort.num_tokens, 2}), sort.first, {}, {}, {}};
        for (TensorView* out : {&problem.sorted_slots, &problem.slot_to_row}) {
            arrays.emplace_back(DType::kInt32, slots);
            *out = arrays.back().view({slots});
        }
        arrays.emplace_back(DType::kInt64, sort.num_local + 1);
        problem.expert_offsets = arrays.back().view({sort.num_local + 1});
        problems.push_back(problem);
    }
    sort_by_expert(problems);
    for (size_t i = 0; i < problems.size(); ++i) {
        const SortProblem& one = problems[i];
        Array wanted[3] = {arrays[4 * i + 1], arrays[4 * i + 2], arrays[4 * i + 3]};
        for (Array& array : wanted) array.fill(77);
        sort_by_expert(one.topk_ids, one.first_expert, wanted[0].view({wanted[0].size()}),
                       wanted[1].view({wanted[1].size()}), wanted[2].view({wanted[2].size()}));
        for (size_t a = 0; a < 3; ++a)
            for (int64_t at = 0; at < wanted[a].size(); ++at)
                expect(arrays[4 * i + 1 + a][at] == wanted[a][at], concat("sort ", i));
    }
    sort_by_expert(std::span<const SortProblem>());
    problems.resize(9, problems[0]);
    expect_invalid([&] { sort_by_expert(problems); }, "problems must be at most 8, got 9");
    problems.resize(2);
    problems[1].topk_ids = on_other_device(problems[1].topk_ids);
    expect_invalid([&] { sort_by_expert(problems); }, "topk_ids must be on");
}

}  // namespace

void add_sort_by_expert_tests(std::vector<Test>& tests) {
    tests.insert(tests.end(),
                 {{"sort_matches_a_naive_sort", test_sort_matches_a_naive_sort},
                  {"several_sorts_are_those_alone", test_several_sorts_are_those_alone},
                  {"sort_names_the_bad_argument", test_sort_names_the_bad_argument}});
}

}  // namespace moecore::test
