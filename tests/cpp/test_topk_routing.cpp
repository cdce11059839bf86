#include <algorithm>
#include <limits>
#include <numeric>

#include "moecore/topk_routing.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

struct Routed {
    std::vector<int64_t> ids;
    std::vector<double> weights;
};

/// The indices of the `count` largest of `values`, ties to the lower index.
std::vector<int64_t> largest(const std::vector<double>& values, int count) {
    std::vector<int64_t> order(values.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)];
    });
    order.resize(static_cast<size_t>(count));
    return order;
}

/// One row in float64, from the formula in topk_routing.hpp.
Routed route_row(const std::vector<double>& logits, const std::vector<double>& bias,
                 const RoutingConfig& config) {
    const size_t count = logits.size();
    const double row_max = *std::max_element(logits.begin(), logits.end());
    std::vector<double> score(count);
    double total = 0.0;
    for (size_t e = 0; e < count; ++e) {
        switch (config.score_function) {
            case ScoreFunction::kSoftmax:
                score[e] = std::exp(logits[e] - row_max);
                break;
            case ScoreFunction::kSigmoid:
                score[e] = sigmoid(logits[e]);
                break;
            case ScoreFunction::kSqrtSoftplus:
                score[e] = std::sqrt(std::log1p(std::exp(logits[e])));
                break;
            case ScoreFunction::kRawLogits:
                score[e] = logits[e];
                break;
        }
        total += score[e];
    }
    if (config.score_function == ScoreFunction::kSoftmax)
        for (double& s : score) s /= total;

    std::vector<double> choice = score;
    for (size_t e = 0; e < bias.size(); ++e) choice[e] += bias[e];
    if (config.group_limit != GroupLimit::kNone) {
        const size_t size = count / static_cast<size_t>(config.num_groups);
        std::vector<double> group_score;
        for (size_t first = 0; first < count; first += size) {
            std::vector<double> members(choice.begin() + static_cast<std::ptrdiff_t>(first),
                                        choice.begin() + static_cast<std::ptrdiff_t>(first + size));
            std::sort(members.rbegin(), members.rend());
            const bool two = config.group_limit == GroupLimit::kTop2Sum && size > 1;
            group_score.push_back(members[0] + (two ? members[1] : 0.0));
        }
        std::vector<bool> kept(count / size);
        for (const int64_t g : largest(group_score, config.topk_group))
            kept[static_cast<size_t>(g)] = true;
        for (size_t e = 0; e < count; ++e)
            if (!kept[e / size]) choice[e] = -std::numeric_limits<double>::infinity();
    }

    Routed result{largest(choice, config.top_k), {}};
    for (const int64_t e : result.ids) result.weights.push_back(score[static_cast<size_t>(e)]);
    double sum = 0.0;
    if (config.score_function == ScoreFunction::kRawLogits) {
        const double top = *std::max_element(result.weights.begin(), result.weights.end());
        for (double& w : result.weights) sum += w = std::exp(w - top);
        for (double& w : result.weights) w = w / sum * config.scale;
        return result;
    }
    for (const double w : result.weights) sum += w;
    const double divisor = config.renormalize ? std::max(sum + config.norm_epsilon,
                                                         static_cast<double>(config.norm_min))
                                              : 1.0;
    for (double& w : result.weights) w = w / divisor * config.scale;
    return result;
}

void check_routing_case(const RoutingConfig& config, int64_t num_experts, DType dtype,
                        bool with_bias, int64_t num_tokens, int64_t gap) {
    Random random(static_cast<uint32_t>(num_experts * 7 + config.top_k + gap));
    const int64_t stride = num_experts + gap;
    Array logits(dtype, strided_size(num_tokens, num_experts, stride));
    // A grid of 1/64: unequal logits give scores that float32 tells apart; equal ones test ties.
    for (int64_t i = 0; i < logits.size(); ++i) logits.set(i, std::round(random.uniform(384)) / 64);
    Array bias = random.array(kF32, with_bias ? num_experts : 0);
    Array ids(DType::kInt32, num_tokens * config.top_k);
    Array weights(kF32, num_tokens * config.top_k);
    topk_routing(logits.rows(num_tokens, num_experts, stride),
                 with_bias ? bias.view({num_experts}) : TensorView{}, config,
                 ids.view({num_tokens, config.top_k}), weights.view({num_tokens, config.top_k}));

    std::vector<double> bias_values;
    for (int64_t e = 0; e < bias.size(); ++e) bias_values.push_back(bias[e]);
    for (int64_t t = 0; t < num_tokens; ++t) {
        std::vector<double> row;
        for (int64_t e = 0; e < num_experts; ++e) row.push_back(logits[t * stride + e]);
        const Routed wanted = route_row(row, bias_values, config);
        for (int64_t j = 0; j < config.top_k; ++j) {
            const std::string what = concat("token ", t, " choice ", j, " of ", num_experts,
                                            " experts, score ", int(config.score_function));
            const int64_t slot = t * config.top_k + j;
            const auto at = static_cast<size_t>(j);
            expect(ids[slot] == static_cast<double>(wanted.ids[at]),
                   concat(what, ": got ", ids[slot], ", wanted ", wanted.ids[at]));
            // Score: 8 roundings at most; sums of up to 32 scores and, over 1024, of 32 partial
            // sums of 32 lose less than 37 more; the division and the scale two.
            expect_close(weights[slot], wanted.weights[at], 48 * kEps * wanted.weights[at], kF32,
                         what);
        }
    }
}

void test_routing_matches_float64_for_every_score_function() {
    for (const int64_t num_experts : {1, 5, 33, 256, 1024})
        for (const DType dtype : {kF32, kBf16})
            for (const ScoreFunction score :
                 {ScoreFunction::kSoftmax, ScoreFunction::kSigmoid, ScoreFunction::kSqrtSoftplus,
                  ScoreFunction::kRawLogits})
                for (const bool renormalize : {true, false})
                    for (const bool with_bias : {false, true})
                        for (const int top_k : {1, 5, 32}) {
                            if (top_k > num_experts) continue;
                            const RoutingConfig config{.top_k = top_k,
                                                       .score_function = score,
                                                       .renormalize = renormalize,
                                                       .scale = 2.5f};
                            check_routing_case(config, num_experts, dtype, with_bias, 7, 0);
                            check_routing_case(config, num_experts, dtype, with_bias, 2, 3);
                        }
}

void test_routing_keeps_the_best_groups() {
    for (const int64_t num_experts : {24, 160, 256, 1024})
        for (const GroupLimit limit : {GroupLimit::kMax, GroupLimit::kTop2Sum})
            for (const ScoreFunction score : {ScoreFunction::kSoftmax, ScoreFunction::kSigmoid})
                for (const bool with_bias : {false, true})
                    for (const int topk_group : {1, 3, 8})
                        for (const DType dtype : {kF32, kBf16})
                            check_routing_case({.top_k = 3,
                                                .score_function = score,
                                                .group_limit = limit,
                                                .num_groups = 8,
                                                .topk_group = topk_group},
                                               num_experts, dtype, with_bias, 9, 1);
}

void test_routing_of_no_tokens_writes_nothing() {
    check_routing_case({.top_k = 2}, 5, kF32, true, 0, 0);
}

/// The epsilon and the smallest divisor are relative to scores that already sum to one.
void test_routing_bounds_the_sum_of_the_scores() {
    for (const int64_t num_experts : {5, 256})
        for (const bool with_bias : {true, false})
            for (const ScoreFunction score : {ScoreFunction::kSigmoid, ScoreFunction::kSqrtSoftplus,
                                              ScoreFunction::kRawLogits, ScoreFunction::kSoftmax}) {
                RoutingConfig config{.top_k = 2, .score_function = score, .norm_epsilon = 0.125f};
                check_routing_case(config, num_experts, kF32, with_bias, 3, 0);
                config.norm_min = 4.0f;
                check_routing_case(config, num_experts, kF32, with_bias, 3, 0);
            }
}

void test_routing_orders_nan_and_infinite_logits() {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<float> logits = {nan, 1.0f, -infinity, 2.0f, nan, nan, nan, -infinity};
    Array ids(DType::kInt32, 8), weights(kF32, 8);
    topk_routing(TensorView(logits.data(), kF32, {2, 4}), {}, {.top_k = 4}, ids.view({2, 4}),
                 weights.view({2, 4}));
    const int wanted[] = {3, 1, 0, 2, 0, 1, 2, 3};
    for (int i = 0; i < 8; ++i) expect(ids[i] == wanted[i], concat("id ", i, " is ", ids[i]));
    for (int i = 2; i < 4; ++i) expect(weights[i] == 0.0, "an excluded expert has no weight");
    for (int i = 4; i < 8; ++i) expect(std::isnan(weights[i]), "an empty row gives NaN weights");
}

void test_routing_names_the_bad_argument() {
    Array logits(kF32, 12), bias(kF32, 4), ids(DType::kInt32, 6), weights(kF32, 6);
    const TensorView l = logits.view({3, 4}), b = bias.view({4}), i = ids.view({3, 2}),
                     w = weights.view({3, 2});
    const RoutingConfig good{.top_k = 2};
    const auto bad = [](TensorView l, TensorView b, RoutingConfig c, TensorView i, TensorView w,
                        const char* text,
                        std::source_location where = std::source_location::current()) {
        expect_invalid([&] { topk_routing(l, b, c, i, w); }, std::string("topk_routing: ") + text,
                       where);
    };
    TensorView negative = l, close = l;
    negative.strides[0] = -4;
    close.strides[0] = 3;
    TensorView wrong_dtype = l;
    wrong_dtype.dtype = DType::kInt32;
    bad({}, b, good, i, w, "router_logits must");
    bad(negative, b, good, i, w, "router_logits must");
    bad(close, b, good, i, w, "router_logits must");
    bad(wrong_dtype, b, good, i, w, "router_logits must");
    bad(on_other_device(l), b, good, i, w, "selection_bias must");
    bad(on_other_device(l), {}, good, i, w, "topk_ids must");
    bad(l, on_other_device(b), good, i, w, "selection_bias must");
    bad(l, bias.view({2, 2}), good, i, w, "selection_bias must");
    bad(l, b, good, on_other_device(i), w, "topk_ids must");
    bad(l, b, good, i, on_other_device(w), "topk_weights must");
    bad(l, b, good, ids.view({2, 3}), w, "topk_ids must");
    bad(l, b, good, i, weights.view({6}), "topk_weights must");
    bad(l, b, good, w, w, "topk_ids must");
    bad(l, b, good, i, i, "topk_weights must");
    bad(l, b, good, i, {}, "topk_weights must");
    bad(l, b, good, i, logits.rows(3, 2, 4), "topk_weights must");
    bad(l, b, good, i, logits.view({3, 2}), "topk_weights must not overlap router_logits");
    bad(l, TensorView(weights.data(), kF32, {4}), good, i, w, "topk_weights must not overlap");
    bad(l, b, good, TensorView(weights.data(), DType::kInt32, {3, 2}), w,
        "topk_weights must not overlap topk_ids");
    bad(l, b, {.top_k = 0}, i, w, "top_k must");
    bad(l, b, {.top_k = 5}, i, w, "top_k must");
    bad(l, b, {.top_k = 2, .scale = INFINITY}, i, w, "scale must");
    bad(l, b, {.top_k = 2, .norm_epsilon = -1.0f}, i, w, "norm_epsilon must");
    bad(l, b, {.top_k = 2, .norm_min = NAN}, i, w, "norm_min must");
    bad(l, b, {.top_k = 2, .group_limit = GroupLimit::kMax, .num_groups = 3}, i, w,
        "num_groups must");
    bad(l, b, {.top_k = 2, .group_limit = GroupLimit::kMax, .num_groups = 2, .topk_group = 3}, i, w,
        "topk_group must");
    bad(l, b, {.top_k = 2, .group_limit = GroupLimit::kMax, .num_groups = 4, .topk_group = 1}, i, w,
        "top_k must");
    Array wide(kF32, 1025);
    bad(wide.view({1, 1025}), {}, good, ids.view({1, 2}), weights.view({1, 2}), "num_experts must");
}

}  // namespace

void add_topk_routing_tests(std::vector<Test>& tests) {
    tests.insert(
        tests.end(),
        {{"routing_matches_float64_for_every_score_function",
          test_routing_matches_float64_for_every_score_function},
         {"routing_keeps_the_best_groups", test_routing_keeps_the_best_groups},
         {"routing_of_no_tokens_writes_nothing", test_routing_of_no_tokens_writes_nothing},
         {"routing_bounds_the_sum_of_the_scores", test_routing_bounds_the_sum_of_the_scores},
         {"routing_orders_nan_and_infinite_logits", test_routing_orders_nan_and_infinite_logits},
         {"routing_names_the_bad_argument", test_routing_names_the_bad_argument}});
}

}  // namespace moecore::test
