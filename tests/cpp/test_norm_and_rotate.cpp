#include "moecore/norm_and_rotate.hpp"

#include "moecore/rms_norm.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

void check_both(DType dtype, int64_t num_tokens, int64_t num_query, int64_t num_key, int64_t width,
                int64_t rotary_dim) {
    const int64_t num_heads = num_query + num_key;
    Random random(7);
    Array got = random.array(dtype, num_tokens * num_heads * width);
    Array want = got;
    Array q_weight = random.array(dtype, width), k_weight = random.array(dtype, width);
    Array angles = random.array(kF32, 5 * rotary_dim);
    Array positions(DType::kInt32, num_tokens);
    for (int64_t t = 0; t < num_tokens; ++t) positions.set(t, static_cast<double>(t % 5));
    const TensorView q = q_weight.view({width}), k = k_weight.view({width});
    const TensorView p = positions.view({num_tokens}), c = angles.view({5, rotary_dim});
    norm_and_rotate(got.view({num_tokens, num_heads, width}), num_query, q, k, 1e-6f, p, c,
                    RotaryPairs::kHalves);

    const TensorView all = want.view({num_tokens, num_heads, width});
    TensorView query = all, key = all;
    query.shape[1] = num_query;
    key.shape[1] = num_key;
    key.data = all.as<char>() + static_cast<size_t>(num_query * width) * size_of(dtype);
    rms_norm(query, q, 1e-6f, {}, query);
    rms_norm(key, k, 1e-6f, {}, key);
    rotary_embedding(all, p, c, RotaryPairs::kHalves);
    expect(got.bytes() == want.bytes(), "the bits of one after the other");
}

void test_norm_and_rotate_is_one_after_the_other() {
    for (const DType dtype : {kF32, kBf16}) {
        check_both(dtype, 7, 4, 2, 64, 64);
        check_both(dtype, 3, 3, 1, 80, 20);
        check_both(dtype, 2, 0, 2, 16, 16);
        check_both(dtype, 0, 2, 1, 16, 8);
    }
}

void test_norm_and_rotate_names_the_bad_argument() {
    Array heads(kF32, 3 * 3 * 8), weight(kF32, 8), angles(kF32, 5 * 8), positions(DType::kInt32, 3);
    const auto bad = [&](int64_t num_query, TensorView q, TensorView k, TensorView p,
                         const char* text,
                         std::source_location where = std::source_location::current()) {
        expect_invalid(
            [&] {
                norm_and_rotate(heads.view({3, 3, 8}), num_query, q, k, 1e-6f, p,
                                angles.view({5, 8}), RotaryPairs::kHalves);
            },
            std::string("norm_and_rotate: ") + text, where);
    };
    const TensorView w = weight.view({8}), p = positions.view({3});
    bad(4, w, w, p, "num_query_heads must be in [0, 3]");
    bad(-1, w, w, p, "num_query_heads must be in [0, 3]");
    bad(2, weight.view({4}), w, p, "q_weight must");
    bad(2, w, weight.view({4}), p, "k_weight must");
    bad(2, w, w, positions.view({2}), "positions must");
    expect_invalid(
        [&] {
            norm_and_rotate(heads.view({9, 8}), 2, w, w, 1e-6f, p, angles.view({5, 8}),
                            RotaryPairs::kHalves);
        },
        "norm_and_rotate: heads must");
}

}  // namespace

void add_norm_and_rotate_tests(std::vector<Test>& tests) {
    tests.insert(
        tests.end(),
        {{"norm_and_rotate_is_one_after_the_other", test_norm_and_rotate_is_one_after_the_other},
         {"norm_and_rotate_names_the_bad_argument", test_norm_and_rotate_names_the_bad_argument}});
}

}  // namespace moecore::test
