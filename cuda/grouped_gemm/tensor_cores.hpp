#pragma once

// What every kernel on tensor cores asks of a problem.

#include <bit>
#include <cstdint>

#include "moecore/kernels/grouped_gemm.hpp"

namespace moecore::cuda {

inline bool is_multiple_of_16(const void* pointer) {
    return std::bit_cast<uintptr_t>(pointer) % 16 == 0;
}

/// Why tensor cores' kernels cannot take a problem, or nullptr if they can. They need what copies
/// of 16 bytes need: bfloat16, K contiguous, sizes that are multiples of 8 (N of a gated
/// activation: 16), and addresses and strides of input and weights that are multiples of 16 bytes.
inline const char* why_no_tensor_cores(const GroupedGemmArgs& args) {
    constexpr int64_t kMostRows = int64_t{1} << 31;
    if (args.dtype != DType::kBFloat16) return "input and weights are not bfloat16";
    if (args.k_stride != 1) return "K is not the contiguous dimension of weights";
    if (args.num_input_rows == 0) return "input has no rows";
    if (args.k_dim % 8 != 0) return "K is not a multiple of 8";
    if (args.n % (is_gated(args.config.activation) ? 16 : 8) != 0)
        return "the output's width is not a multiple of 8";
    if (!is_multiple_of_16(args.weights) || !is_multiple_of_16(args.input))
        return "the address of input or weights is not a multiple of 16";
    if (args.n_stride % 8 != 0 || args.group_stride % 8 != 0 || args.input_stride % 8 != 0)
        return "a stride of input or weights is not a multiple of 8 elements";
    if (args.num_rows >= kMostRows || args.num_input_rows >= kMostRows || args.n >= kMostRows ||
        args.k_dim >= kMostRows / 2 || args.input_stride >= kMostRows / 2)
        return "a size is 2^30 or more";
    if (args.num_input_rows * args.input_stride >= int64_t{1} << 34)
        return "input spans 2^34 elements or more";
    return nullptr;
}

}  // namespace moecore::cuda
