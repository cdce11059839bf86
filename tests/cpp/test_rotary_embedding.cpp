#include "moecore/rotary_embedding.hpp"

#include <functional>

#include "moecore/threads.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

void check_rotary(DType dtype, RotaryPairs pairs, int64_t head_dim, int64_t rotary_dim,
                  int64_t gap) {
    constexpr int64_t kTokens = 9, kHeads = 3, kPositions = 5;
    Random random(static_cast<uint32_t>(head_dim * 31 + rotary_dim));
    const int64_t token_stride = kHeads * head_dim + gap, half = rotary_dim / 2;
    Array x = random.array(dtype, strided_size(kTokens, kHeads * head_dim, token_stride));
    Array cos_sin = random.array(kF32, kPositions * rotary_dim);
    Array positions(DType::kInt32, kTokens);
    for (int64_t t = 0; t < kTokens; ++t)
        positions.set(t, static_cast<double>(random.below(kPositions)));
    const Array before = x;
    TensorView view = x.view({kTokens, kHeads, head_dim});
    view.strides[0] = token_stride;
    rotary_embedding(view, positions.view({kTokens}), cos_sin.view({kPositions, rotary_dim}),
                     pairs);
    for (int64_t t = 0; t < kTokens; ++t)
        for (int64_t h = 0; h < kHeads; ++h) {
            const int64_t row = t * token_stride + h * head_dim;
            const auto angle = static_cast<int64_t>(positions[t]) * rotary_dim;
            for (int64_t i = 0; i < half; ++i) {
                const bool halves = pairs == RotaryPairs::kHalves;
                const int64_t first = row + (halves ? i : 2 * i);
                const int64_t second = row + (halves ? i + half : 2 * i + 1);
                const double a = before[first], b = before[second];
                const double c = cos_sin[angle + i], s = cos_sin[angle + half + i];
                const double bound = 3 * kEps * (std::abs(a) + std::abs(b));
                const std::string what = concat("token ", t, " head ", h, " pair ", i);
                expect_close(x[first], a * c - b * s, bound, dtype, what);
                expect_close(x[second], b * c + a * s, bound, dtype, what);
            }
            for (int64_t i = rotary_dim; i < head_dim; ++i)
                expect(x[row + i] == before[row + i], "elements past rotary_dim stay");
        }
}

void test_rotary_embedding_is_right() {
    const std::pair<int64_t, int64_t> dims[] = {{2, 2}, {64, 64}, {80, 20}, {66, 34}, {30, 30}};
    for (const DType dtype : {kF32, kBf16})
        for (const RotaryPairs pairs : {RotaryPairs::kHalves, RotaryPairs::kInterleaved})
            for (const auto& [head_dim, rotary_dim] : dims)
                for (const int64_t gap : {0, 7})
                    check_rotary(dtype, pairs, head_dim, rotary_dim, gap);
}

void test_rotary_embedding_names_the_bad_argument() {
    Array x(kF32, 24), positions(DType::kInt32, 24), cos_sin(kF32, 24);
    struct Arguments {
        TensorView x, positions, cos_sin;
    };
    const Arguments good{x.view({2, 3, 4}), positions.view({2}), cos_sin.view({5, 4})};
    const auto call = [](const Arguments& a) {
        rotary_embedding(a.x, a.positions, a.cos_sin, RotaryPairs::kHalves);
    };
    call(good);
    const auto bad = [&](const std::function<void(Arguments&)>& change, const char* text,
                         std::source_location where = std::source_location::current()) {
        Arguments a = good;
        change(a);
        expect_invalid([&] { call(a); }, std::string("rotary_embedding: ") + text, where);
    };
    bad([](auto& a) { a.x = {}; }, "x must");
    bad([](auto& a) { a.x.dtype = DType::kInt32; }, "x must");
    bad([](auto& a) { a.x.strides[1] = -4; }, "x must");
    bad([](auto& a) { a.positions.dtype = DType::kInt64; }, "positions must");
    bad([](auto& a) { a.positions.shape[0] = 3; }, "positions must");
    bad([](auto& a) { a.positions.device = kOtherDevice; }, "positions must");
    bad([](auto& a) { a.cos_sin.dtype = kBf16; }, "cos_sin must");
    bad([](auto& a) { a.cos_sin.shape[1] = 3; }, "cos_sin must");
    bad([](auto& a) { a.cos_sin.shape[1] = 0; }, "cos_sin must");
    bad([](auto& a) { a.cos_sin.shape[1] = 6; }, "cos_sin must");
    bad([](auto& a) { a.cos_sin.strides[0] = -4; }, "cos_sin must");
    bad([](auto& a) { a.cos_sin.device = kOtherDevice; }, "cos_sin must");
    bad([](auto& a) { a.x.data = a.positions.data; }, "x must not overlap positions");
    bad([](auto& a) { a.x.data = a.cos_sin.data; }, "x must not overlap cos_sin");
    for (const int64_t position : {-1, 5}) {
        Array wrong = int_array(DType::kInt32, {0, position});
        bad([&](auto& a) { a.positions = wrong.view({2}); }, "positions must be in [0, 5)");
    }
}

}  // namespace

void add_rotary_embedding_tests(std::vector<Test>& tests) {
    tests.insert(tests.end(), {{"rotary_embedding_is_right", test_rotary_embedding_is_right},
                               {"rotary_embedding_names_the_bad_argument",
                                test_rotary_embedding_names_the_bad_argument}});
}

}  // namespace moecore::test
