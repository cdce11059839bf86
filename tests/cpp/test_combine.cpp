#include <algorithm>
#include <functional>

#include "moecore/combine.hpp"
#include "moecore/threads.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

/// The reference is exact: the same fused multiply-adds in float32, one rounding to bfloat16.
void check_combine(DType rows_dtype, DType output_dtype, int64_t num_tokens, int64_t width,
                   int64_t top_k, bool with_shared, bool with_scale, int64_t gap) {
    Random random(static_cast<uint32_t>(width * 31 + num_tokens));
    const int64_t num_rows = std::max<int64_t>(1, num_tokens * top_k / 2), stride = width + gap;
    Array rows = random.array(rows_dtype, strided_size(num_rows, width, stride));
    Array shared = random.array(rows_dtype, strided_size(num_tokens, width, stride));
    Array weights = random.array(kF32, num_tokens * top_k), scale = random.array(kF32, num_tokens);
    Array slot_to_row(DType::kInt32, num_tokens * top_k);
    for (int64_t i = 0; i < slot_to_row.size(); ++i)
        slot_to_row.set(i, static_cast<double>(random.below(num_rows + 1) - 1));
    if (num_tokens > 1)  // a token without any expert
        for (int64_t j = 0; j < top_k; ++j) slot_to_row.set(top_k + j, -1);
    Array wanted(output_dtype, strided_size(num_tokens, width, stride));
    wanted.fill(-99);
    Array output = wanted;
    for (int64_t t = 0; t < num_tokens; ++t)
        for (int64_t h = 0; h < width; ++h) {
            float sum = 0.0f;
            for (int64_t j = 0; j < top_k; ++j) {
                const auto row = static_cast<int64_t>(slot_to_row[t * top_k + j]);
                if (row >= 0)
                    sum = std::fma(static_cast<float>(weights[t * top_k + j]),
                                   static_cast<float>(rows[row * stride + h]), sum);
            }
            if (with_shared)
                sum = std::fma(with_scale ? static_cast<float>(scale[t]) : 1.0f,
                               static_cast<float>(shared[t * stride + h]), sum);
            wanted.set(t * stride + h, sum);
        }
    const TensorView shared_view =
        with_shared ? shared.rows(num_tokens, width, stride) : TensorView{};
    const auto run = [&](const TensorView& target) {
        combine(rows.rows(num_rows, width, stride), slot_to_row.view({num_tokens * top_k}),
                weights.view({num_tokens, top_k}), shared_view,
                with_scale ? scale.view({num_tokens}) : TensorView{}, target);
    };
    for (const int threads : {1, 2}) {
        set_num_threads(threads);
        run(output.rows(num_tokens, width, stride));
        expect(output.bytes() == wanted.bytes(),
               concat(name_of(rows_dtype), " to ", name_of(output_dtype), ", T ", num_tokens, " H ",
                      width, " k ", top_k, " shared ", with_shared, with_scale, " gap ", gap));
    }
    if (with_shared && rows_dtype == output_dtype && gap == 0) {
        run(shared_view);
        expect(shared.bytes() == wanted.bytes(), "in place");
    }
}

void test_combine_is_exact() {
    for (const DType rows_dtype : {kF32, kBf16})
        for (const DType output_dtype : {kF32, kBf16})
            for (const int64_t width : {1, 15, 16, 31, 65, 577})
                for (const int64_t num_tokens : {0, 1, 2, 9})
                    for (const int shared : {0, 1, 2})
                        for (const int64_t gap : {0, 3})
                            check_combine(rows_dtype, output_dtype, num_tokens, width,
                                          num_tokens == 9 ? 8 : 1, shared > 0, shared > 1, gap);
}

void test_combine_names_the_bad_argument() {
    // Each as large as the output, so that memory shared with one is shared with no other.
    Array rows(kF32, 20), slots(DType::kInt32, 15), weights(kF32, 15), shared(kF32, 16);
    Array scale(kF32, 15), output(kF32, 15);
    struct Arguments {
        TensorView rows, slots, weights, shared, scale, output;
    };
    const Arguments good{rows.view({4, 5}),   slots.view({6}), weights.view({3, 2}),
                         shared.view({3, 5}), scale.view({3}), output.view({3, 5})};
    const auto call = [](const Arguments& a) {
        combine(a.rows, a.slots, a.weights, a.shared, a.scale, a.output);
    };
    call(good);
    const auto bad = [&](const std::function<void(Arguments&)>& change, const char* text,
                         std::source_location where = std::source_location::current()) {
        Arguments a = good;
        change(a);
        expect_invalid([&] { call(a); }, std::string("combine: ") + text, where);
    };
    bad([](auto& a) { a.rows = {}; }, "expert_rows must");
    bad([](auto& a) { a.rows.dtype = DType::kInt32; }, "expert_rows must");
    bad([](auto& a) { a.rows.shape[1] = 4; }, "expert_rows must");
    bad([](auto& a) { a.rows.strides[0] = -5; }, "expert_rows must");
    bad([](auto& a) { a.rows.device = kOtherDevice; }, "expert_rows must");
    bad([](auto& a) { a.slots = {}; }, "slot_to_row must");
    bad([](auto& a) { a.slots.dtype = DType::kInt64; }, "slot_to_row must");
    bad([](auto& a) { a.slots.shape[0] = 5; }, "slot_to_row must");
    bad([](auto& a) { a.slots.strides[0] = -1; }, "slot_to_row must");
    bad([](auto& a) { a.slots.device = kOtherDevice; }, "slot_to_row must");
    bad([](auto& a) { a.weights.dtype = kBf16; }, "topk_weights must");
    bad([](auto& a) { a.weights.shape = {2, 3, 0, 0}; }, "topk_weights must");
    bad([](auto& a) { a.weights.strides[0] = -2; }, "topk_weights must");
    bad([](auto& a) { a.weights.device = kOtherDevice; }, "topk_weights must");
    bad([](auto& a) { a.shared.dtype = kBf16; }, "shared_output must");
    bad([](auto& a) { a.shared.shape[0] = 2; }, "shared_output must");
    bad([](auto& a) { a.shared.strides[0] = -5; }, "shared_output must");
    bad([](auto& a) { a.shared.device = kOtherDevice; }, "shared_output must");
    bad([](auto& a) { a.shared = {}; }, "shared_scale must");
    bad([](auto& a) { a.scale.dtype = kBf16; }, "shared_scale must");
    bad([](auto& a) { a.scale.shape[0] = 2; }, "shared_scale must");
    bad([](auto& a) { a.scale.strides[0] = -1; }, "shared_scale must");
    bad([](auto& a) { a.scale.device = kOtherDevice; }, "shared_scale must");
    bad([](auto& a) { a.output = {}; }, "output must");
    bad([](auto& a) { a.output.dtype = DType::kInt64; }, "output must");
    bad([](auto& a) { a.output.shape[1] = 0; }, "output must");
    bad([](auto& a) { a.output.strides[0] = -5; }, "output must");
    bad([](auto& a) { a.output.device = kOtherDevice; }, "expert_rows must");
    bad([](auto& a) { a.output.data = a.rows.data; }, "output must not overlap expert_rows");
    bad([](auto& a) { a.output.data = a.slots.data; }, "output must not overlap slot_to_row");
    bad([](auto& a) { a.output.data = a.weights.data; }, "output must not overlap topk_weights");
    bad([](auto& a) { a.output.data = a.scale.data; }, "output must not overlap shared_scale");
    bad([](Arguments& a) { a.output.data = a.shared.as<float>() + 1; },
        "output must not overlap shared_output");
    for (const int64_t row : {-2, 4}) {
        Array wrong = int_array(DType::kInt32, {0, 1, 2, 3, -1, row});
        bad([&](auto& a) { a.slots = wrong.view({6}); }, "slot_to_row must");
    }
}

}  // namespace

void add_combine_tests(std::vector<Test>& tests) {
    tests.insert(tests.end(),
                 {{"combine_is_exact", test_combine_is_exact},
                  {"combine_names_the_bad_argument", test_combine_names_the_bad_argument}});
}

}  // namespace moecore::test
