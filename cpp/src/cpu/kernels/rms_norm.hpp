#pragma once

// Root mean square norms of a range of rows. Included after simd/*.hpp.

#include <cmath>
#include <cstdint>

#include "cpu/kernels/combine.hpp"
#include "cpu/kernels/round.hpp"
#include "moecore/kernels/rms_norm.hpp"

namespace moecore::cpu {
namespace {

constexpr int kNormVectors = 4;  ///< partial sums of 16 lanes

/// Calls fn(column, count, v) for the row's vectors of `count` <= 16 columns, v the partial sum
/// that they add to: a constant after unrolling, except in the last columns.
template <typename Fn>
void for_each_vector(int64_t width, Fn&& fn) {
    int64_t column = 0;
    for (; column + kNormVectors * kLanes <= width; column += kNormVectors * kLanes)
#pragma GCC unroll 4
        for (int v = 0; v < kNormVectors; ++v) fn(column + v * kLanes, kLanes, v);
    for (int v = 0; column < width; column += kLanes, ++v)
        fn(column, static_cast<int>(width - column < kLanes ? width - column : kLanes), v);
}

template <bool kBFloat16, bool kWeightBFloat16, bool kResidual>
void norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
    constexpr DType kDType = kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
    int64_t token = begin / args.num_heads, head = begin % args.num_heads;
    const auto offset_of = [&](const HeadStrides& strides) {
        return token * strides.token + head * strides.head;
    };
    for (int64_t row = begin; row < end; ++row) {
        // 1. Squares; with a residual, the sum that takes its place.
        const int64_t input = offset_of(args.input_strides);
        const int64_t residual = offset_of(args.residual_strides);
        const auto zero = F32x16::broadcast(0.0f);
        F32x16 partial[kNormVectors] = {zero, zero, zero, zero};
        for_each_vector(args.width, [&](int64_t column, int count, int v) {
            F32x16 x = load_columns<kBFloat16>(args.input, input + column, count);
            if constexpr (kResidual) {
                x = add(x, load_columns<kBFloat16>(args.residual, residual + column, count));
                x = rounded<kBFloat16>(x);
                store_columns(x, kDType, args.residual, residual + column, count);
            }
            partial[v] = fma(x, x, partial[v]);
        });
        const F32x16 squares = add(add(partial[0], partial[1]), add(partial[2], partial[3]));
        const float mean = reduce_add(squares) / static_cast<float>(args.width);
        const F32x16 scale = F32x16::broadcast(1.0f / std::sqrt(mean + args.eps));

        // 2. Scale. Output may be the input's memory: each vector is read before it is written.
        const void* source = kResidual ? args.residual : args.input;
        const int64_t from = kResidual ? residual : input;
        const int64_t to = offset_of(args.output_strides);
        for_each_vector(args.width, [&](int64_t column, int count, int) {
            const F32x16 x = load_columns<kBFloat16>(source, from + column, count);
            const F32x16 weight = load_columns<kWeightBFloat16>(args.weight, column, count);
            store_columns(mul(weight, rounded<kBFloat16>(mul(x, scale))), kDType, args.output,
                          to + column, count);
        });

        if (++head < args.num_heads) continue;
        head = 0;
        ++token;
    }
}

template <bool kResidual>
void norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
    if (args.dtype == DType::kFloat32)
        norm_rows<false, false, kResidual>(args, begin, end);
    else if (args.weight_dtype == DType::kFloat32)
        norm_rows<true, false, kResidual>(args, begin, end);
    else
        norm_rows<true, true, kResidual>(args, begin, end);
}

inline void rms_norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
    if (args.residual != nullptr)
        norm_rows<true>(args, begin, end);
    else
        norm_rows<false>(args, begin, end);
}

}  // namespace
}  // namespace moecore::cpu
