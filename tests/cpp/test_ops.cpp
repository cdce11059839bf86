#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

#include "moecore/buffer.hpp"
#include "moecore/combine.hpp"
#include "moecore/grouped_gemm.hpp"
#include "moecore/packed_weights.hpp"
#include "moecore/sort_by_expert.hpp"
#include "moecore/threads.hpp"
#include "moecore/topk_routing.hpp"
#include "moecore/workspace.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

constexpr DType kF32 = DType::kFloat32;
constexpr DType kBf16 = DType::kBFloat16;
constexpr double kEps = 0x1p-24;  // half a unit in the last place of float32

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// --- topk_routing -------------------------------------------------------------------------------

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

// --- sort_by_expert -----------------------------------------------------------------------------

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

// --- grouped_gemm and linear --------------------------------------------------------------------

struct GemmCase {
    DType dtype = kF32;
    DType output_dtype = kF32;
    int64_t n = 1, k_dim = 1;
    std::vector<int64_t> offsets = {0, 1};
    GroupedGemmConfig config;
    bool with_bias = false;
    DType bias_dtype = kF32;
    bool gather = false;
    int64_t gap = 0;  ///< between rows of input and output
};

double activate(const GroupedGemmConfig& config, double g, double u) {
    switch (config.activation) {
        case Activation::kNone:
            return g;
        case Activation::kSwiglu:
            return g * sigmoid(g) * u;
        case Activation::kClampedSwiglu: {
            const double limit = config.limit;
            g = std::min(g, limit);
            u = std::clamp(u, -limit, limit);
            return g * sigmoid(config.alpha * g) * (u + config.up_offset);
        }
        case Activation::kGeluTanh:
            return 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u;
    }
    return 0.0;
}

/// Runs one case with plain weights of both orders and packed ones, on one thread and on two: all
/// six have the same bits, and those are near the float64 result.
void check_gemm(const GemmCase& c) {
    Random random(static_cast<uint32_t>(c.n * 1000 + c.k_dim * 10 + c.gap));
    const bool gated = is_gated(c.config.activation);
    const bool interleaved = c.config.gate_order == GateOrder::kInterleaved;
    const auto num_groups = static_cast<int64_t>(c.offsets.size()) - 1;
    const int64_t width = gated ? c.n / 2 : c.n;
    const int64_t num_rows = c.offsets.back();
    constexpr int64_t kSlotsPerToken = 3;
    const int64_t num_inputs = c.gather ? std::max<int64_t>(1, num_rows / 2) : num_rows;
    const int64_t in_stride = c.k_dim + c.gap, out_stride = width + c.gap;

    Array input = random.array(c.dtype, strided_size(num_inputs, c.k_dim, in_stride));
    Array weights = random.array(c.dtype, num_groups * c.n * c.k_dim);  // [G, N, K]
    Array transposed(c.dtype, weights.size());                          // [G, K, N]
    for (int64_t g = 0; g < num_groups; ++g)
        for (int64_t n = 0; n < c.n; ++n)
            for (int64_t k = 0; k < c.k_dim; ++k)
                transposed.set((g * c.k_dim + k) * c.n + n, weights[(g * c.n + n) * c.k_dim + k]);
    TensorView plain = weights.view({num_groups, c.n, c.k_dim});
    TensorView plain_transposed = transposed.view({num_groups, c.n, c.k_dim});
    plain_transposed.strides = {c.n * c.k_dim, 1, c.n, 0};
    PackedWeights packed(c.dtype, num_groups, c.n, c.k_dim, gated);
    PackedWeights packed_transposed(c.dtype, num_groups, c.n, c.k_dim, gated);
    for (int64_t g = 0; g < num_groups; ++g)
        for (const bool t : {false, true}) {
            const int64_t row_stride = t ? 1 : c.k_dim, k_stride = t ? c.n : 1;
            char* base = static_cast<char*>(t ? transposed.data() : weights.data());
            const auto matrix = [&](int64_t first_row, int64_t rows, int64_t step) {
                TensorView view(base + (g * c.n * c.k_dim + first_row * row_stride) *
                                           static_cast<int64_t>(size_of(c.dtype)),
                                c.dtype, {rows, c.k_dim});
                view.strides = {row_stride * step, k_stride, 0, 0};
                return view;
            };
            PackedWeights& target = t ? packed_transposed : packed;
            if (!gated)
                target.pack(g, matrix(0, c.n, 1));
            else if (interleaved)
                target.pack_gated(g, matrix(0, width, 2), matrix(1, width, 2));
            else
                target.pack_gated(g, matrix(0, width, 1), matrix(width, width, 1));
        }
    Array bias = random.array(c.bias_dtype, c.with_bias ? num_groups * c.n : 0);
    Array offsets = int_array(DType::kInt64, c.offsets);
    Array slots(DType::kInt32, c.gather ? num_rows : 0);
    for (int64_t r = 0; r < slots.size(); ++r)
        slots.set(r, static_cast<double>(random.below(num_inputs * kSlotsPerToken)));

    const Array untouched = [&] {
        Array array(c.output_dtype, strided_size(num_rows, width, out_stride));
        array.fill(-99);
        return array;
    }();
    const auto run = [&](const GroupedGemmWeights& w, int threads) {
        Array output = untouched;
        set_num_threads(threads);
        grouped_gemm(
            input.rows(num_inputs, c.k_dim, in_stride), w,
            c.with_bias ? bias.view({num_groups, c.n}) : TensorView{},
            offsets.view({num_groups + 1}), c.gather ? slots.view({num_rows}) : TensorView{},
            c.gather ? kSlotsPerToken : 1, c.config, output.rows(num_rows, width, out_stride));
        return output;
    };
    const Array output = run(plain, 1);
    const std::string what =
        concat(name_of(c.dtype), " to ", name_of(c.output_dtype), " N ", c.n, " K ", c.k_dim,
               " activation ", int(c.config.activation), " interleaved ", interleaved, " bias ",
               c.with_bias, " gather ", c.gather, " gap ", c.gap);
    for (const int threads : {1, 2}) {
        expect(run(plain, threads).bytes() == output.bytes(), "plain bits, " + what);
        expect(run(plain_transposed, threads).bytes() == output.bytes(),
               "transposed bits, " + what);
        expect(run(packed, threads).bytes() == output.bytes(), "packed bits, " + what);
        expect(run(packed_transposed, threads).bytes() == output.bytes(),
               "packed from transposed bits, " + what);
    }

    struct Dot {
        double value, bound;
    };
    const auto dot = [&](int64_t group, int64_t row, int64_t feature) {
        const int64_t source = c.gather ? static_cast<int64_t>(slots[row]) / kSlotsPerToken : row;
        Dot result{0.0, 0.0};
        for (int64_t k = 0; k < c.k_dim; ++k) {
            const double product =
                input[source * in_stride + k] * weights[(group * c.n + feature) * c.k_dim + k];
            result.value += product;
            result.bound += std::abs(product);
        }
        if (c.with_bias) {
            result.value += bias[group * c.n + feature];
            result.bound += std::abs(bias[group * c.n + feature]);
        }
        // K products and K + 1 additions, each rounded once, on partial sums below sum(|products|).
        result.bound *= static_cast<double>(2 * c.k_dim + 2) * kEps;
        return result;
    };
    std::vector<bool> written(static_cast<size_t>(output.size()));
    for (int64_t g = 0; g < num_groups; ++g)
        for (int64_t r = c.offsets[static_cast<size_t>(g)];
             r < c.offsets[static_cast<size_t>(g) + 1]; ++r)
            for (int64_t f = 0; f < width; ++f) {
                written[static_cast<size_t>(r * out_stride + f)] = true;
                const double actual = output[r * out_stride + f];
                const std::string where =
                    concat("group ", g, " row ", r, " feature ", f, ", ", what);
                const Dot gate = dot(g, r, gated && interleaved ? 2 * f : f);
                if (!gated) {
                    expect_close(actual, gate.value, gate.bound, c.output_dtype, where);
                    continue;
                }
                const Dot up = dot(g, r, interleaved ? 2 * f + 1 : width + f);
                const double wanted = activate(c.config, gate.value, up.value);
                // |d/dg| <= 1.13 (|u| + offset), |d/du| <= |g|; the function itself loses a dozen
                // roundings, relative to g (u + offset), which bounds the result.
                const double u = std::abs(up.value) + 1.0, gv = std::abs(gate.value);
                const double bound =
                    1.2 * gate.bound * (u + up.bound) + up.bound * gv + 16 * kEps * gv * u;
                expect_close(actual, wanted, bound, c.output_dtype, where);
            }
    for (int64_t i = 0; i < output.size(); ++i)
        expect(written[static_cast<size_t>(i)] || output[i] == untouched[i],
               concat("element ", i, " belongs to no group and must not change, ", what));
}

void test_gemm_matches_float64_at_odd_sizes() {
    int64_t turn = 0;
    for (const DType dtype : {kF32, kBf16})
        for (const int64_t n : {1, 31, 65, 577})
            for (const int64_t k_dim : {1, 31, 65, 577})
                for (const Activation activation :
                     {Activation::kNone, Activation::kSwiglu, Activation::kClampedSwiglu,
                      Activation::kGeluTanh})
                    for (const GateOrder order :
                         {GateOrder::kConcatenated, GateOrder::kInterleaved}) {
                        const bool gated = is_gated(activation);
                        if (!gated && order == GateOrder::kInterleaved) continue;
                        ++turn;
                        const int64_t first = turn % 3, second = turn % 13 + 1;
                        GemmCase c;
                        c.dtype = dtype;
                        c.output_dtype = turn % 2 == 0 ? kF32 : kBf16;
                        c.n = !gated || n == 577 ? n + (gated ? 1 : 0) : 2 * n;
                        c.k_dim = k_dim;
                        c.offsets = {first, first + second, first + second, first + second + 1,
                                     first + second + 1};
                        c.config.activation = activation;
                        c.config.gate_order = order;
                        c.config.limit = 1.5f;
                        c.with_bias = turn % 3 != 0;
                        c.bias_dtype = turn % 5 < 2 ? dtype : kF32;
                        c.gather = turn % 4 < 2;
                        c.gap = turn % 7 < 3 ? 0 : turn % 7;
                        check_gemm(c);
                    }
}

void test_gemm_matches_float64_for_1_to_13_rows() {
    for (const DType dtype : {kF32, kBf16})
        for (const bool gated : {false, true})
            for (int64_t rows = 1; rows <= 13; ++rows) {
                GemmCase c;
                c.dtype = dtype;
                c.output_dtype = dtype;
                c.n = 66;
                c.k_dim = 33;
                c.offsets = {0, 0, rows};
                c.config.activation = gated ? Activation::kSwiglu : Activation::kNone;
                c.gather = rows % 2 == 0;
                check_gemm(c);
            }
}

void test_gemm_cuts_long_groups_and_long_k() {
    GemmCase c;
    c.n = 70;
    c.k_dim = 1030;  // three blocks of K when plain
    c.offsets = {0, 0, 250, 257};
    check_gemm(c);
    c.dtype = c.output_dtype = kBf16;
    c.gather = true;
    check_gemm(c);
}

void test_gemm_of_no_rows_writes_nothing() {
    GemmCase c;
    c.n = 5;
    c.k_dim = 3;
    c.offsets = {0, 0, 0};
    check_gemm(c);
    c.dtype = kBf16;
    check_gemm(c);
}

void test_gemm_reads_any_stride_of_a_dimension_of_one() {
    Random random(3);
    for (const DType dtype : {kF32, kBf16})
        for (const bool one_column : {false, true}) {
            const int64_t n = one_column ? 7 : 1, k_dim = one_column ? 1 : 7;
            Array input = random.array(dtype, 2 * k_dim), weights = random.array(dtype, 6 * 3 + 1);
            Array output(kF32, 2 * n);
            TensorView weight = weights.view({n, k_dim});
            weight.strides = one_column ? decltype(weight.strides){3, 50, 0, 0}
                                        : decltype(weight.strides){50, 3, 0, 0};
            linear(input.view({2, k_dim}), weight, {}, {}, output.view({2, n}));
            for (int64_t r = 0; r < 2; ++r)
                for (int64_t f = 0; f < n; ++f) {
                    double sum = 0.0, bound = 0.0;
                    for (int64_t k = 0; k < k_dim; ++k) {
                        const double product = input[r * k_dim + k] * weights[3 * (f + k)];
                        sum += product;
                        bound += std::abs(product) * 16 * kEps;
                    }
                    expect_close(output[r * n + f], sum, bound, kF32, "stride 3");
                }
        }
}

void test_linear_is_grouped_gemm_of_one_group() {
    Random random(11);
    for (const DType dtype : {kF32, kBf16})
        for (const int64_t n : {1, 31, 65})
            for (const int64_t rows : {0, 1, 7, 13}) {
                const int64_t k_dim = 67;
                Array input = random.array(dtype, rows * k_dim);
                Array weight = random.array(dtype, n * k_dim), bias = random.array(kF32, n);
                Array offsets = int_array(DType::kInt64, {0, rows});
                Array wanted(dtype, rows * n), plain(dtype, rows * n), packed(dtype, rows * n);
                grouped_gemm(input.view({rows, k_dim}), weight.view({1, n, k_dim}),
                             bias.view({1, n}), offsets.view({2}), {}, 1, {},
                             wanted.view({rows, n}));
                linear(input.view({rows, k_dim}), weight.view({n, k_dim}), bias.view({n}), {},
                       plain.view({rows, n}));
                PackedWeights packed_weight(dtype, 1, n, k_dim, false);
                packed_weight.pack(0, weight.view({n, k_dim}));
                linear(input.view({rows, k_dim}), packed_weight, bias.view({n}), {},
                       packed.view({rows, n}));
                expect(plain.bytes() == wanted.bytes(), "plain");
                expect(packed.bytes() == wanted.bytes(), "packed");
            }
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
    };
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
                     a.output);
    };
    call(good);
    const auto bad = [&](const std::function<void(Arguments&)>& change, const char* text,
                         std::source_location where = std::source_location::current()) {
        Arguments a = good;
        change(a);
        expect_invalid([&] { call(a); }, std::string("grouped_gemm: ") + text, where);
    };
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
    bad(on_other_device(x), w, b, y, "weight");
    bad(x, weight.view({1, 5, 4}), b, y, "weight must");
    bad(x, {}, b, y, "weight");
    bad(x, reversed, b, y, "weight");
    bad(x, on_other_device(w), b, y, "weight");
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
    bad(x, other_dtype, b, y, "weight");
    bad(x, gated, {}, y, "weight");
}

// --- PackedWeights, Buffer, Workspace -----------------------------------------------------------

void test_packed_weights_name_the_bad_argument() {
    const auto bad_size = [](DType dtype, int64_t groups, int64_t n, int64_t k, bool gated,
                             const char* text) {
        expect_invalid([&] { PackedWeights(dtype, groups, n, k, gated); },
                       std::string("PackedWeights: ") + text);
    };
    bad_size(DType::kInt32, 1, 1, 1, false, "dtype must");
    bad_size(kF32, 0, 1, 1, false, "num_groups must");
    bad_size(kF32, 1, 0, 1, false, "n must");
    bad_size(kF32, 1, 3, 1, true, "n must");
    bad_size(kF32, 1, 1, 0, false, "k_dim must");
    bool unsupported = false;
    try {
        PackedWeights(kF32, 1, 1, 1, false, kOtherDevice);
    } catch (const UnsupportedError&) {
        unsupported = true;
    }
    expect(unsupported, "packed weights on a GPU must be unsupported");

    Array data(kF32, 24), other(kBf16, 24);
    PackedWeights plain(kF32, 2, 6, 4, false), gated(kF32, 2, 6, 4, true);
    plain.pack(1, data.view({6, 4}));
    gated.pack_gated(1, data.view({3, 4}), data.view({3, 4}));
    TensorView strided = data.view({3, 4});
    strided.strides = {1, 3, 0, 0};
    const TensorView half = data.view({3, 4});
    const std::pair<std::function<void()>, const char*> calls[] = {
        {[&] { plain.pack(2, data.view({6, 4})); }, "group must"},
        {[&] { plain.pack(-1, data.view({6, 4})); }, "group must"},
        {[&] { plain.pack(0, data.view({4, 6})); }, "weights must"},
        {[&] { plain.pack(0, {}); }, "weights must"},
        {[&] { plain.pack(0, other.view({6, 4})); }, "weights must"},
        {[&] { plain.pack(0, on_other_device(data.view({6, 4}))); }, "weights must"},
        {[&] { plain.pack_gated(0, half, half); }, "pack_gated needs"},
        {[&] { gated.pack(0, data.view({6, 4})); }, "pack needs"},
        {[&] { gated.pack_gated(0, data.view({6, 4}), half); }, "gate must"},
        {[&] { gated.pack_gated(0, half, data.view({6, 4})); }, "up must"},
        {[&] { gated.pack_gated(0, half, other.view({3, 4})); }, "up must"},
        {[&] { gated.pack_gated(0, half, on_other_device(half)); }, "up must"},
        {[&] { gated.pack_gated(0, half, strided); }, "gate and up must"},
        {[&] { gated.pack_gated(2, half, half); }, "group must"},
    };
    for (const auto& [call, text] : calls)
        expect_invalid(call, std::string("PackedWeights: ") + text);
}

void test_buffer_of_3_mb_is_aligned_and_writable() {
    for (const size_t bytes : {size_t{1}, size_t{257}, (size_t{2} << 20) - 1, size_t{2} << 20,
                               size_t{3} << 20, size_t{3'000'000}}) {
        Buffer buffer({}, bytes);
        std::memset(buffer.data(), 1, bytes);
        expect(reinterpret_cast<uintptr_t>(buffer.data()) % 256 == 0, "256-byte alignment");
        if (bytes >= size_t{2} << 20)
            expect(reinterpret_cast<uintptr_t>(buffer.data()) % (size_t{2} << 20) == 0,
                   "2 MiB alignment");
        void* data = buffer.data();
        Buffer moved(std::move(buffer));
        expect(moved.data() == data && moved.size_bytes() == bytes, "a move keeps the memory");
        Buffer assigned;
        assigned = std::move(moved);
        expect(assigned.data() == data, "so does a move assignment");
    }
    expect(Buffer({}, 0).data() == nullptr, "no bytes, no memory");
}

void test_workspace_hands_out_exactly_its_bytes() {
    Workspace workspace({}, 512);
    std::memset(workspace.take(kF32, {64}).data, 1, 256);
    std::memset(workspace.take(DType::kInt64, {4, 8}).data, 2, 256);
    expect_invalid([&] { workspace.take(kBf16, {1}); }, "Workspace: size must");
    expect(workspace.take(kBf16, {0, 3}).num_elements() == 0, "an empty view always fits");
    workspace.reset();
    expect_invalid([&] { workspace.take(kF32, {129}); }, "Workspace: size must");
    workspace.grow(768);
    std::memset(workspace.take(kF32, {129}).data, 3, 516);
    workspace.grow(16);
    expect(workspace.size_bytes() == 768, "grow never shrinks");
}

void test_thread_counts() {
    set_num_threads(2);
    expect(num_threads() == 2, "two threads");
    set_num_threads(0);
    expect(num_threads() >= 1, "0 follows OpenMP");
    expect_invalid([] { set_num_threads(-1); }, "num_threads must");
}

// --- combine ------------------------------------------------------------------------------------

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

void add_op_tests(std::vector<Test>& tests) {
    tests.insert(
        tests.end(),
        {{"routing_matches_float64_for_every_score_function",
          test_routing_matches_float64_for_every_score_function},
         {"routing_keeps_the_best_groups", test_routing_keeps_the_best_groups},
         {"routing_of_no_tokens_writes_nothing", test_routing_of_no_tokens_writes_nothing},
         {"routing_bounds_the_sum_of_the_scores", test_routing_bounds_the_sum_of_the_scores},
         {"routing_orders_nan_and_infinite_logits", test_routing_orders_nan_and_infinite_logits},
         {"routing_names_the_bad_argument", test_routing_names_the_bad_argument},
         {"sort_matches_a_naive_sort", test_sort_matches_a_naive_sort},
         {"sort_names_the_bad_argument", test_sort_names_the_bad_argument},
         {"gemm_matches_float64_at_odd_sizes", test_gemm_matches_float64_at_odd_sizes},
         {"gemm_matches_float64_for_1_to_13_rows", test_gemm_matches_float64_for_1_to_13_rows},
         {"gemm_cuts_long_groups_and_long_k", test_gemm_cuts_long_groups_and_long_k},
         {"gemm_of_no_rows_writes_nothing", test_gemm_of_no_rows_writes_nothing},
         {"gemm_reads_any_stride_of_a_dimension_of_one",
          test_gemm_reads_any_stride_of_a_dimension_of_one},
         {"linear_is_grouped_gemm_of_one_group", test_linear_is_grouped_gemm_of_one_group},
         {"gemm_names_the_bad_argument", test_gemm_names_the_bad_argument},
         {"linear_names_the_bad_argument", test_linear_names_the_bad_argument},
         {"packed_weights_name_the_bad_argument", test_packed_weights_name_the_bad_argument},
         {"buffer_of_3_mb_is_aligned_and_writable", test_buffer_of_3_mb_is_aligned_and_writable},
         {"workspace_hands_out_exactly_its_bytes", test_workspace_hands_out_exactly_its_bytes},
         {"thread_counts", test_thread_counts},
         {"combine_is_exact", test_combine_is_exact},
         {"combine_names_the_bad_argument", test_combine_names_the_bad_argument}});
}

}  // namespace moecore::test
