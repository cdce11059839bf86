#pragma once

// Weighted sums of expert rows. Included after simd/*.hpp.

#include <cstdint>
#include <cstring>

#include "moecore/kernels/combine.hpp"

namespace moecore::cpu {
namespace {

/// `count` <= 16 elements from `p`, the other lanes 0.
template <bool kBFloat16>
F32x16 load_columns(const void* p, int64_t offset, int count) {
    if constexpr (kBFloat16) {
        const uint16_t* source = static_cast<const uint16_t*>(p) + offset;
        if (count == kLanes) return F32x16::load_bf16(source);
        uint16_t lanes[kLanes] = {};
        std::memcpy(lanes, source, static_cast<size_t>(count) * sizeof(uint16_t));
        return F32x16::load_bf16(lanes);
    } else {
        const float* source = static_cast<const float*>(p) + offset;
        if (count == kLanes) return F32x16::load(source);
        float lanes[kLanes] = {};
        std::memcpy(lanes, source, static_cast<size_t>(count) * sizeof(float));
        return F32x16::load(lanes);
    }
}

inline void store_columns(F32x16 x, DType dtype, void* p, int64_t offset, int count) {
    if (dtype == DType::kBFloat16) {
        uint16_t* target = static_cast<uint16_t*>(p) + offset;
        if (count == kLanes) return x.store_bf16(target);
        uint16_t lanes[kLanes];
        x.store_bf16(lanes);
        std::memcpy(target, lanes, static_cast<size_t>(count) * sizeof(uint16_t));
    } else {
        float* target = static_cast<float*>(p) + offset;
        if (count == kLanes) return x.store(target);
        float lanes[kLanes];
        x.store(lanes);
        std::memcpy(target, lanes, static_cast<size_t>(count) * sizeof(float));
    }
}

template <bool kBFloat16>
void combine_rows(const CombineArgs& args, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        const int32_t* slot_to_row = args.slot_to_row + token * args.top_k;
        const float* weights = args.topk_weights + token * args.top_k;
        for (int64_t h = 0; h < args.hidden_size; h += kLanes) {
            const int count =
                static_cast<int>(args.hidden_size - h < kLanes ? args.hidden_size - h : kLanes);
            F32x16 sum = F32x16::broadcast(0.0f);
            for (int j = 0; j < args.top_k; ++j) {
                if (slot_to_row[j] < 0) continue;
                const int64_t offset = slot_to_row[j] * args.rows_stride + h;
                sum = fma(F32x16::broadcast(weights[j]),
                          load_columns<kBFloat16>(args.expert_rows, offset, count), sum);
            }
            if (args.shared_output != nullptr) {
                const float scale = args.shared_scale ? args.shared_scale[token] : 1.0f;
                const int64_t offset = token * args.shared_stride + h;
                sum = fma(F32x16::broadcast(scale),
                          load_columns<kBFloat16>(args.shared_output, offset, count), sum);
            }
            store_columns(sum, args.output_dtype, args.output, token * args.output_stride + h,
                          count);
        }
    }
}

inline void combine_tokens(const CombineArgs& args, int64_t begin, int64_t end) {
    if (args.rows_dtype == DType::kBFloat16)
        combine_rows<true>(args, begin, end);
    else
        combine_rows<false>(args, begin, end);
}

}  // namespace
}  // namespace moecore::cpu
