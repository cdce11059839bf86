#pragma once

#include <cstdint>

#include "moecore/dtype.hpp"
#include "moecore/stream.hpp"

namespace moecore {

/// What every combine kernel takes. Built and checked by ops/combine.cpp. T tokens, k = top_k.
struct CombineArgs {
    const void* expert_rows;     ///< [>= R, H] of rows_dtype
    const int32_t* slot_to_row;  ///< [T * k], -1 for a dropped slot
    const float* topk_weights;   ///< [T, k]
    const void* shared_output;   ///< [T, H] of rows_dtype, or nullptr
    const float* shared_scale;   ///< [T], or nullptr for 1
    void* output;                ///< [T, H] of output_dtype, out
    int64_t num_rows;            ///< of expert_rows
    int64_t num_tokens;          ///< T >= 0
    int64_t hidden_size;         ///< H >= 1
    int64_t rows_stride;         ///< elements between rows of expert_rows
    int64_t shared_stride;
    int64_t output_stride;
    int top_k;
    DType rows_dtype;
    DType output_dtype;
};

namespace cpu {
void combine(const CombineArgs& args);
}
namespace cuda {
/// slot_to_row is on the device, where no check has seen it: values outside [0, num_rows) add
/// nothing.
void combine(const CombineArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
