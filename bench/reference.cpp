#include "reference.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

namespace moecore::bench {
namespace {

double widen(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

/// weights [rows, width] @ x [width]
std::vector<double> multiply(const OwnedTensor& weights, const std::vector<double>& x) {
    std::vector<double> y(static_cast<size_t>(weights.view.shape[0]));
#pragma omp parallel for
    for (size_t r = 0; r < y.size(); ++r) {
        const uint16_t* row = weights.view.as<uint16_t>() + r * x.size();
        double sum = 0;
        for (size_t c = 0; c < x.size(); ++c) sum += widen(row[c]) * x[c];
        y[r] = sum;
    }
    return y;
}

bool check_token(const LayerShape& shape, const std::function<ExpertWeights(int)>& expert_of,
                 int64_t token, const TensorView& hidden, const TensorView& logits,
                 const TensorView& output) {
    const auto width = static_cast<size_t>(shape.hidden_size);
    std::vector<double> x(width);
    for (size_t h = 0; h < width; ++h)
        x[h] = widen(hidden.as<uint16_t>()[static_cast<size_t>(token) * width + h]);

    const float* row = logits.as<float>() + token * shape.num_experts;
    std::vector<int> order(static_cast<size_t>(shape.num_experts));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
    double total = 0;
    for (int j = 0; j < shape.top_k; ++j) total += std::exp(double{row[order[j]]} - row[order[0]]);

    std::vector<double> sum(width);
    for (int j = 0; j < shape.top_k; ++j) {
        const ExpertWeights expert = expert_of(order[j]);
        std::vector<double> inner = multiply(expert.gate, x);
        const std::vector<double> up = multiply(expert.up, x);
        for (size_t i = 0; i < inner.size(); ++i) inner[i] *= up[i] / (1 + std::exp(-inner[i]));
        const std::vector<double> y = multiply(expert.down, inner);
        const double weight = std::exp(double{row[order[j]]} - row[order[0]]) / total;
        for (size_t h = 0; h < width; ++h) sum[h] += weight * y[h];
    }
    double error = 0, norm = 0;
    for (size_t h = 0; h < width; ++h) {
        const double got = widen(output.as<uint16_t>()[static_cast<size_t>(token) * width + h]);
        error += (got - sum[h]) * (got - sum[h]);
        norm += sum[h] * sum[h];
    }
    return std::sqrt(error) <= 0.01 * std::sqrt(norm);  // false for a NaN
}

/// The indices of the `count` largest of `values`, ties to the lower index.
std::vector<size_t> largest(const std::vector<double>& values, int count) {
    std::vector<size_t> order(values.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return values[a] > values[b]; });
    order.resize(static_cast<size_t>(count));
    return order;
}

/// Every expert's score, unnormalised for the exponential ones.
std::vector<double> scores_of(const RoutingConfig& config, const float* logits, size_t count) {
    const double row_max = *std::max_element(logits, logits + count);
    std::vector<double> scores(count);
    double total = 0;
    for (size_t e = 0; e < count; ++e) {
        const double x = logits[e];
        switch (config.score_function) {
            case ScoreFunction::kSoftmax:
            case ScoreFunction::kRawLogits:
                scores[e] = std::exp(x - row_max);
                break;
            case ScoreFunction::kSigmoid:
                scores[e] = 1 / (1 + std::exp(-x));
                break;
            case ScoreFunction::kSqrtSoftplus:
                scores[e] = std::sqrt(std::log1p(std::exp(x)));
                break;
        }
        total += scores[e];
    }
    if (config.score_function == ScoreFunction::kSoftmax)
        for (double& score : scores) score /= total;
    return scores;
}

/// Sets the choices outside the best groups to -inf.
void drop_groups(const RoutingConfig& config, std::vector<double>& choice) {
    if (config.group_limit == GroupLimit::kNone) return;
    const size_t size = choice.size() / static_cast<size_t>(config.num_groups);
    std::vector<double> group_scores;
    for (size_t first = 0; first < choice.size(); first += size) {
        const auto begin = choice.begin() + static_cast<std::ptrdiff_t>(first);
        std::vector<double> members(begin, begin + static_cast<std::ptrdiff_t>(size));
        std::sort(members.rbegin(), members.rend());
        const bool two = config.group_limit == GroupLimit::kTop2Sum && size > 1;
        group_scores.push_back(members[0] + (two ? members[1] : 0));
    }
    std::vector<bool> kept(group_scores.size());
    for (const size_t group : largest(group_scores, config.topk_group)) kept[group] = true;
    for (size_t e = 0; e < choice.size(); ++e)
        if (!kept[e / size]) choice[e] = -INFINITY;
}

}  // namespace

ExpertWeights make_expert(const LayerShape& shape, uint64_t layer, int expert) {
    const int64_t h = shape.hidden_size, i = shape.intermediate_size;
    const uint64_t seed = layer * 1000003 + static_cast<uint64_t>(expert) * 3;
    return {random_tensor(DType::kBFloat16, {i, h}, 0.05f, seed),
            random_tensor(DType::kBFloat16, {i, h}, 0.05f, seed + 1),
            random_tensor(DType::kBFloat16, {h, i}, 0.05f, seed + 2)};
}

bool check_layer(const LayerShape& shape, const std::function<ExpertWeights(int)>& expert,
                 const TensorView& hidden, const TensorView& logits, const TensorView& output) {
    const int64_t last = hidden.shape[0] - 1;
    return check_token(shape, expert, 0, hidden, logits, output) &&
           (last == 0 || check_token(shape, expert, last, hidden, logits, output));
}

bool check_grouped_gemm(const TensorView& input, const TensorView& weights,
                        const TensorView& expert_offsets, const TensorView& sorted_slots,
                        int slots_per_token, bool gated, const TensorView& output) {
    const int64_t num_rows = output.shape[0], width = output.shape[1];
    const int64_t* offsets = expert_offsets.as<int64_t>();
    for (const int64_t row : {int64_t{0}, num_rows / 2, num_rows - 1}) {
        int64_t group = 0;
        while (offsets[group + 1] <= row) ++group;
        const int64_t source =
            sorted_slots.defined() ? sorted_slots.as<int32_t>()[row] / slots_per_token : row;
        const uint16_t* x = input.as<uint16_t>() + source * input.strides[0];
        const auto dot = [&](int64_t feature) {
            const uint16_t* w =
                weights.as<uint16_t>() + group * weights.strides[0] + feature * weights.strides[1];
            double sum = 0;
            for (int64_t k = 0; k < weights.shape[2]; ++k)
                sum += widen(x[k]) * widen(w[k * weights.strides[2]]);
            return sum;
        };
        double error = 0, norm = 0;
        for (int64_t column = 0; column < width; column += 7) {
            double wanted = dot(column);
            if (gated) wanted *= dot(width + column) / (1 + std::exp(-wanted));
            const double got = widen(output.as<uint16_t>()[row * output.strides[0] + column]);
            error += (got - wanted) * (got - wanted);
            norm += wanted * wanted;
        }
        if (!(std::sqrt(error) <= 0.01 * std::sqrt(norm))) return false;  // so is a NaN
    }
    return true;
}

bool check_routing(const RoutingConfig& config, const TensorView& logits, const TensorView& bias,
                   const TensorView& topk_ids, const TensorView& topk_weights) {
    const auto count = static_cast<size_t>(logits.shape[1]);
    const bool exponential = config.score_function == ScoreFunction::kRawLogits;
    for (int64_t token = 0; token < logits.shape[0]; ++token) {
        const float* row = logits.as<float>() + token * logits.strides[0];
        const std::vector<double> scores = scores_of(config, row, count);
        std::vector<double> choice = scores;
        if (exponential) choice.assign(row, row + count);
        for (size_t e = 0; bias.defined() && e < count; ++e) choice[e] += bias.as<float>()[e];
        drop_groups(config, choice);
        const std::vector<size_t> wanted = largest(choice, config.top_k);
        const int32_t* ids = topk_ids.as<int32_t>() + token * config.top_k;
        double sum = 0;
        for (int j = 0; j < config.top_k; ++j) {
            if (ids[j] < 0 || static_cast<size_t>(ids[j]) >= count) return false;
            const double got = choice[static_cast<size_t>(ids[j])];
            if (!(std::abs(got - choice[wanted[static_cast<size_t>(j)]]) < 1e-6)) return false;
            sum += scores[static_cast<size_t>(ids[j])];
        }
        double divisor = 1;
        if (exponential)
            divisor = sum;
        else if (config.renormalize)
            divisor = std::max(sum + config.norm_epsilon, static_cast<double>(config.norm_min));
        for (int j = 0; j < config.top_k; ++j) {
            const double weight = scores[static_cast<size_t>(ids[j])] / divisor * config.scale;
            const double got = topk_weights.as<float>()[token * config.top_k + j];
            if (!(std::abs(got - weight) <= 1e-5 * weight)) return false;
        }
    }
    return true;
}

}  // namespace moecore::bench
