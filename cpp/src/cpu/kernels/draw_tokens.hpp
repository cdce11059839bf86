#pragma once

// One token of each row of logits. Included after simd/*.hpp.

#include <cmath>
#include <cstdint>

#include "cpu/kernels/math.hpp"
#include "moecore/kernels/draw_tokens.hpp"

namespace moecore::cpu {
namespace {

/// Tokens whose largest logit, or sum of weights, is kept, so that a second look finds the place.
constexpr int64_t kDrawBlock = 4096;
constexpr int64_t kMaxDrawBlocks = kMaxDrawnVocab / kDrawBlock;

struct DrawRow {
    const float* logits;
    int64_t vocab_size;
    F32x16 maximum, temperature, min_p;
};

/// Sixteen logits from `i` on; -inf beyond the vocabulary.
inline F32x16 load_logits(const DrawRow& row, int64_t i) {
    if (i + kLanes <= row.vocab_size) return F32x16::load(row.logits + i);
    float lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
        lanes[lane] = i + lane < row.vocab_size ? row.logits[i + lane] : -__builtin_huge_valf();
    return F32x16::load(lanes);
}

/// The row's largest logit, and the first token that has it. A NaN anywhere gives NaN.
inline float find_maximum(const DrawRow& row, int64_t& token) {
    const F32x16 minus_inf = F32x16::broadcast(-__builtin_huge_valf());
    F32x16 nan = F32x16::broadcast(0.0f);
    float maximum = -__builtin_huge_valf();
    int64_t first_block = 0;
    for (int64_t block = 0; block < row.vocab_size; block += kDrawBlock) {
        const int64_t end =
            block + kDrawBlock < row.vocab_size ? block + kDrawBlock : row.vocab_size;
        F32x16 largest = minus_inf;
        for (int64_t i = block; i < end; i += kLanes) {
            const F32x16 x = load_logits(row, i);
            nan = select(is_nan(x), x, nan);
            largest = max(largest, select(is_nan(x), minus_inf, x));
        }
        const float block_maximum = reduce_max(largest);
        if (block_maximum > maximum) {
            maximum = block_maximum;
            first_block = block;
        }
    }
    token = first_block;
    while (token < row.vocab_size && row.logits[token] != maximum) ++token;
    const float poison = reduce_add(nan);
    return poison == 0.0f ? maximum : poison;
}

/// Adds up weights of the tokens from `begin` to `end`, both multiples of 16 or the vocabulary's
/// end. Stops at the first token with which the sum exceeds `target`, and returns it, or `end`.
inline int64_t add_weights(const DrawRow& row, int64_t begin, int64_t end, int64_t target,
                           int64_t& sum) {
    constexpr float kWeightOfLikeliest = 0x1p40f;
    const F32x16 zero = F32x16::broadcast(0.0f), scale = F32x16::broadcast(kWeightOfLikeliest);
    for (int64_t i = begin; i < end; i += kLanes) {
        const F32x16 x = sub(load_logits(row, i), row.maximum);
        const F32x16 likelihood = exp(div(x, row.temperature));
        const F32x16 kept = select(less(likelihood, row.min_p), zero, likelihood);
        alignas(64) float weights[kLanes];
        mul(kept, scale).store(weights);
        int64_t more = 0;
        for (int lane = 0; lane < kLanes; ++lane) more += static_cast<int64_t>(weights[lane]);
        if (sum + more <= target) {
            sum += more;
            continue;
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            sum += static_cast<int64_t>(weights[lane]);
            if (sum > target) return i + lane;
        }
    }
    return end;
}

inline int64_t draw_from(const DrawRow& row, double noise) {
    int64_t block_sums[kMaxDrawBlocks];
    int64_t total = 0;
    int64_t num_blocks = 0;
    for (int64_t begin = 0; begin < row.vocab_size; begin += kDrawBlock, ++num_blocks) {
        const int64_t end =
            begin + kDrawBlock < row.vocab_size ? begin + kDrawBlock : row.vocab_size;
        int64_t& sum = block_sums[num_blocks];
        sum = 0;
        add_weights(row, begin, end, INT64_MAX, sum);
        total += sum;
    }
    const auto point = static_cast<int64_t>(static_cast<double>(total) * noise);
    const int64_t target = point < total ? point : total - 1;
    int64_t sum = 0, block = 0;
    while (sum + block_sums[block] <= target) sum += block_sums[block++];
    return add_weights(row, block * kDrawBlock, row.vocab_size, target, sum);
}

inline DrawnToken draw_row(const float* logits, int64_t vocab_size, const DrawParams& params) {
    DrawRow row{};
    row.logits = logits;
    row.vocab_size = vocab_size;
    int64_t token = 0;
    const float maximum = find_maximum(row, token);
    if (!std::isfinite(maximum)) return {0, maximum};
    if (params.temperature == 0.0f) return {token, maximum};
    row.maximum = F32x16::broadcast(maximum);
    row.temperature = F32x16::broadcast(params.temperature);
    row.min_p = F32x16::broadcast(params.min_p);
    return {draw_from(row, params.noise), maximum};
}

inline void draw_rows(const DrawTokensArgs& args, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
        args.tokens[n] =
            draw_row(args.logits + n * args.logits_stride, args.vocab_size, args.params[n]);
}

}  // namespace
}  // namespace moecore::cpu
