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
    for (size_t r = 0; r < y.size(); ++r) {
        const uint16_t* row = weights.view.as<uint16_t>() + r * x.size();
        double sum = 0;
        for (size_t c = 0; c < x.size(); ++c) sum += widen(row[c]) * x[c];
        y[r] = sum;
    }
    return y;
}

bool check_token(const LayerShape& shape, uint64_t layer, int64_t token, const TensorView& hidden,
                 const TensorView& logits, const TensorView& output) {
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
        const ExpertWeights expert = make_expert(shape, layer, order[j]);
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

}  // namespace

ExpertWeights make_expert(const LayerShape& shape, uint64_t layer, int expert) {
    const int64_t h = shape.hidden_size, i = shape.intermediate_size;
    const uint64_t seed = layer * 1000003 + static_cast<uint64_t>(expert) * 3;
    return {random_tensor(DType::kBFloat16, {i, h}, 0.05f, seed),
            random_tensor(DType::kBFloat16, {i, h}, 0.05f, seed + 1),
            random_tensor(DType::kBFloat16, {h, i}, 0.05f, seed + 2)};
}

bool check_layer(const LayerShape& shape, uint64_t layer, const TensorView& hidden,
                 const TensorView& logits, const TensorView& output) {
    const int64_t last = hidden.shape[0] - 1;
    return check_token(shape, layer, 0, hidden, logits, output) &&
           (last == 0 || check_token(shape, layer, last, hidden, logits, output));
}

}  // namespace moecore::bench
