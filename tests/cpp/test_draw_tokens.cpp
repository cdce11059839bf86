#include "moecore/draw_tokens.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "test_main.hpp"

namespace moecore::test {
namespace {

DrawnToken draw_one(const TensorView& logits, const DrawParams& params) {
    DrawnToken token{};
    draw_tokens(logits, {&params, 1}, {&token, 1});
    return token;
}

/// Rows end at the end of their memory, so that a sanitizer sees a read beyond them.
void test_noise_falls_into_every_token_in_turn() {
    for (const int64_t vocab_size : {1, 15, 16, 33, 4097}) {
        Array logits(kF32, vocab_size);
        for (int64_t i = 0; i < vocab_size; ++i) logits.set(i, 0.0);
        for (int64_t i = 0; i < vocab_size; ++i) {
            const double noise = (static_cast<double>(i) + 0.5) / static_cast<double>(vocab_size);
            const DrawnToken token = draw_one(logits.view({1, vocab_size}),
                                              {.temperature = 2.0f, .min_p = 1.0f, .noise = noise});
            expect(token.token_id == i, concat("token ", i, " of ", vocab_size));
            expect(token.maximum == 0.0f, "maximum");
        }
    }
}

void test_the_largest_logit_at_temperature_0() {
    Array logits(kF32, 5000);
    for (int64_t i = 0; i < 5000; ++i) logits.set(i, -1.0);
    for (const int64_t place : {0, 17, 4095, 4096, 4999}) {
        logits.set(place, 3.0);
        const DrawnToken token = draw_one(logits.view({1, 5000}), {});
        expect(token.token_id == place && token.maximum == 3.0f, concat("largest at ", place));
        logits.set(place, std::numeric_limits<double>::quiet_NaN());
        expect(std::isnan(draw_one(logits.view({1, 5000}), {}).maximum), concat("NaN at ", place));
        logits.set(place, -1.0);
    }
}

void test_draw_tokens_names_the_bad_argument() {
    Array logits(kF32, 8);
    for (int64_t i = 0; i < 8; ++i) logits.set(i, 0.0);
    const TensorView good = logits.view({2, 4});
    const auto bad = [&](const TensorView& view, DrawParams params, size_t count, const char* text,
                         std::source_location where = std::source_location::current()) {
        const std::vector<DrawParams> all(count, params);
        std::vector<DrawnToken> tokens(count);
        expect_invalid([&] { draw_tokens(view, all, tokens); }, std::string("draw_tokens: ") + text,
                       where);
    };
    bad({}, {}, 2, "logits must");
    bad(logits.view({8}), {}, 2, "logits must have shape");
    bad(logits.view({2, 0}), {}, 2, "logits must have 1 to");
    bad(good, {}, 1, "params must be one a row");
    bad(good, {.temperature = -1.0f}, 2, "temperature must");
    bad(good, {.min_p = 2.0f}, 2, "min_p must");
    bad(good, {.noise = 1.0}, 2, "noise must");
}

}  // namespace

void add_draw_tokens_tests(std::vector<Test>& tests) {
    tests.insert(tests.end(),
                 {{"draw_tokens_noise_falls_into_every_token_in_turn",
                   test_noise_falls_into_every_token_in_turn},
                  {"draw_tokens_takes_the_largest_logit_at_temperature_0",
                   test_the_largest_logit_at_temperature_0},
                  {"draw_tokens_names_the_bad_argument", test_draw_tokens_names_the_bad_argument}});
}

}  // namespace moecore::test
