#include <functional>

#include "moecore/grouped_gemm.hpp"
#include "moecore/packed_weights.hpp"
#include "test_main.hpp"

namespace moecore::test {

struct Part {
    int* texts_made;
};

std::string to_string(const Part& part) {
    ++*part.texts_made;
    return "the part";
}

namespace {

void test_a_check_makes_text_only_if_it_fails() {
    int texts_made = 0;
    const Part part{&texts_made};
    require(true, "op: must not fail, got ", part);
    expect(texts_made == 0, "no text of what is right");
    expect_invalid([&] { require(false, "op: must fail, got ", part); },
                   "op: must fail, got the part");
}

void test_gemm_names_the_bad_argument() {
    // Each as large as the output, so that memory shared with one is shared with no other.
    Array input(kF32, 15), weights(kF32, 40), bias(kF32, 15), output(kF32, 15);
    Array offsets = int_array(DType::kInt64, {0, 1, 3, 0, 0, 0, 0, 0});
    Array slots(DType::kInt32, 15);
    struct Arguments {
        TensorView input, weights, bias, offsets, slots;
        int per_token = 1;
        GroupedGemmConfig config;
        TensorView output;
        TensorView counters = {};
    };
    Array counters(DType::kInt32, 2);
    const Arguments good{input.view({3, 4}),
                         weights.view({2, 5, 4}),
                         bias.view({2, 5}),
                         offsets.view({3}),
                         slots.view({3}),
                         1,
                         {},
                         output.view({3, 5})};
    const auto call = [](const Arguments& a) {
        grouped_gemm(a.input, a.weights, a.bias, a.offsets, a.slots, a.per_token, a.config,
                     a.output, {}, a.counters);
    };
    call(good);
    const auto bad = [&](const std::function<void(Arguments&)>& change, const char* text,
                         std::source_location where = std::source_location::current()) {
        Arguments a = good;
        change(a);
        expect_invalid([&] { call(a); }, std::string("grouped_gemm: ") + text, where);
    };
    bad([&](auto& a) { a.counters = counters.view({1}); }, "work_counters must have 2 elements");
    bad([&](auto& a) { a.counters = on_other_device(counters.view({2})); }, "work_counters must");
    bad([](auto& a) { a.counters = a.offsets; }, "work_counters must");
    bad([](auto& a) { a.input = {}; }, "input must");
    bad([](auto& a) { a.input.strides[0] = -4; }, "input must");
    bad([](auto& a) { a.input.strides[1] = 2; }, "input must");
    bad([](auto& a) { a.input.dtype = DType::kInt32; }, "input must");
    bad([](auto& a) { a.input.shape[1] = 3; }, "input must");
    bad([](auto& a) { a.input.device = kOtherDevice; }, "weights must");
    bad([](auto& a) { a.weights = {}; }, "weights must");
    bad([](auto& a) { a.weights.dtype = kBf16; }, "weights must");
    bad([](auto& a) { a.weights.device = kOtherDevice; }, "weights must");
    bad([](auto& a) { a.weights.strides[0] = -20; }, "weights must");
    bad([](auto& a) { a.weights.strides[1] = -4; }, "weights must");
    bad([](auto& a) { a.weights.strides = {20, 4, 2, 0}; }, "weights must");
    bad([](auto& a) { a.weights.shape[0] = 0; }, "weights must");
    bad([](auto& a) { a.config.activation = Activation::kSwiglu; }, "weights must");
    bad([](auto& a) { a.bias.dtype = kBf16; }, "bias must");
    bad([](auto& a) { a.bias.shape[1] = 4; }, "bias must");
    bad([](auto& a) { a.bias.strides[0] = -5; }, "bias must");
    bad([](auto& a) { a.bias.device = kOtherDevice; }, "bias must");
    bad([](auto& a) { a.offsets = {}; }, "expert_offsets must");
    bad([](auto& a) { a.offsets.dtype = DType::kInt32; }, "expert_offsets must");
    bad([](auto& a) { a.offsets.shape[0] = 2; }, "expert_offsets must");
    bad([](auto& a) { a.offsets.strides[0] = -1; }, "expert_offsets must");
    bad([](auto& a) { a.offsets.device = kOtherDevice; }, "expert_offsets must");
    bad([](auto& a) { a.slots.dtype = DType::kInt64; }, "sorted_slots must");
    bad([](auto& a) { a.slots.strides[0] = 2; }, "sorted_slots must");
    bad([](auto& a) { a.slots.device = kOtherDevice; }, "sorted_slots must");
    bad([](auto& a) { a.slots.shape[0] = 2; }, "expert_offsets must");
    bad([](auto& a) { a.per_token = 0; }, "slots_per_token must");
    bad([](auto& a) { a.output = {}; }, "output must");
    bad([](auto& a) { a.output.dtype = DType::kInt32; }, "output must");
    bad([](auto& a) { a.output.shape[1] = 4; }, "output must");
    bad([](auto& a) { a.output.strides[0] = -5; }, "output must");
    bad([](auto& a) { a.output.strides[0] = 4; }, "output must");
    bad([](auto& a) { a.output.device = kOtherDevice; }, "output must");
    bad([](auto& a) { a.output.shape[0] = 2; }, "expert_offsets must");
    bad([](auto& a) { a.output.data = a.input.data; }, "output must not overlap input");
    bad([](auto& a) { a.output.data = a.weights.data; }, "output must not overlap weights");
    bad([](auto& a) { a.output.data = a.bias.data; }, "output must not overlap bias");
    bad([](auto& a) { a.output.data = a.slots.data; }, "output must not overlap sorted_slots");
    bad([](auto& a) { a.output.data = a.offsets.data; }, "output must not overlap expert_offsets");
    for (const auto& values : {std::vector<int64_t>{-1, 1, 3}, {0, 2, 1}, {0, 1, 4}}) {
        Array wrong = int_array(DType::kInt64, values);
        bad([&](auto& a) { a.offsets = wrong.view({3}); }, "expert_offsets must");
        bad([&](auto& a) { a.offsets = wrong.view({3}), a.slots = {}; }, "expert_offsets must");
    }
    for (const auto& values : {std::vector<int64_t>{-1, 0, 0}, {0, 0, 3}}) {
        Array wrong = int_array(DType::kInt32, values);
        bad([&](auto& a) { a.slots = wrong.view({3}); }, "sorted_slots must");
    }
    const auto clamped = [](GroupedGemmConfig change) {
        change.activation = Activation::kClampedSwiglu;
        return [change](auto& a) { a.config = change; };
    };
    bad(clamped({.alpha = NAN}), "alpha must");
    bad(clamped({.limit = 0.0f}), "limit must");
    bad(clamped({.up_offset = INFINITY}), "up_offset must");
}

void test_linear_names_the_bad_argument() {
    Array input(kF32, 15), weight(kF32, 20), bias(kF32, 5), output(kF32, 15);
    const TensorView x = input.view({3, 4}), w = weight.view({5, 4}), b = bias.view({5}),
                     y = output.view({3, 5});
    const auto bad = [](TensorView x, const GroupedGemmWeights& w, TensorView b, TensorView y,
                        const char* text,
                        std::source_location where = std::source_location::current()) {
        expect_invalid([&] { linear(x, w, b, {}, y); }, std::string("linear: ") + text, where);
    };
    TensorView reversed = w, short_rows = b;
    reversed.strides[0] = -4;
    short_rows.strides[0] = -1;
    bad(input.view({12}), w, b, y, "input must");
    // 2^62 rows of the same memory: the number of elements is no int64_t.
    TensorView endless = x, endless_output = y;
    endless.shape[0] = endless_output.shape[0] = int64_t{1} << 62;
    endless.strides[0] = endless_output.strides[0] = 0;
    bad(endless, w, b, endless_output, "input must have contiguous rows");
    bad(on_other_device(x), w, b, y, "weight must be on cuda:0, got cpu");
    bad(x, weight.view({1, 5, 4}), b, y, "weight must");
    bad(x, {}, b, y, "weight must have shape [any, any, any], got");
    bad(x, reversed, b, y, "weight must have one of their last two dimensions contiguous");
    bad(x, on_other_device(w), b, y, "weight must be on cpu, got cuda:0");
    bad(x, w, bias.view({1, 5}), y, "bias must");
    bad(x, w, bias.view({4}), y, "bias must");
    bad(x, w, short_rows, y, "bias must");
    bad(x, w, on_other_device(b), y, "bias must");
    bad(x, w, b, output.view({2, 5}), "output must");
    bad(x, w, b, output.view({3, 4}), "output must");
    bad(x, w, b, on_other_device(y), "output must");
    bad(x, w, b, {}, "output must");
    bad(x, w, b, TensorView(input.data(), kF32, {3, 5}), "output must not overlap input");
    bad(x, w, b, TensorView(weight.data(), kF32, {3, 5}), "output must not overlap weight");
    const PackedWeights two(kF32, 2, 5, 4, false);
    bad(x, two, b, y, "weight must hold one group");
    const PackedWeights other_dtype(kBf16, 1, 5, 4, false), gated(kF32, 1, 6, 4, true);
    bad(x, other_dtype, b, y, "weight must be float32 as the input is, got bfloat16");
    bad(x, gated, {}, y, "weight must be packed with gated = false");
}

}  // namespace

void add_grouped_gemm_argument_tests(std::vector<Test>& tests) {
    tests.insert(tests.end(),
                 {{"a_check_makes_text_only_if_it_fails", test_a_check_makes_text_only_if_it_fails},
                  {"gemm_names_the_bad_argument", test_gemm_names_the_bad_argument},
                  {"linear_names_the_bad_argument", test_linear_names_the_bad_argument}});
}

}  // namespace moecore::test
