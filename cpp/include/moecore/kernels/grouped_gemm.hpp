#pragma once

#include <cstdint>

#include "moecore/grouped_gemm.hpp"
#include "moecore/stream.hpp"

namespace moecore {

/// What every grouped_gemm kernel takes. Built and checked by ops/grouped_gemm.cpp.
/// G groups, N output features, K reduction, R rows.
struct GroupedGemmArgs {
    const void* input;              ///< [X, K] of `dtype`
    int64_t input_stride;           ///< elements between rows
    int64_t num_input_rows;         ///< X
    const int32_t* sorted_slots;    ///< [R], or nullptr: row r reads input row r
    int slots_per_token;            ///< row r reads input row sorted_slots[r] / slots_per_token
    const int64_t* expert_offsets;  ///< [G + 1]; nullptr with G = 1: rows 0 .. num_rows - 1
    int64_t num_rows;               ///< an upper bound of R, known without reading expert_offsets:
                                    ///< every row below it is in output, and in what it is read
                                    ///< through (sorted_slots, or input)
    int64_t expected_rows;          ///< <= num_rows: how many there likely are, for tiles' sizes
    const void* weights;            ///< packed, or plain with the strides below
    bool is_packed;
    int64_t group_stride;        ///< elements between groups
    int64_t n_stride, k_stride;  ///< of plain weights; one of them is 1
    const void* bias;            ///< [G, N] of `bias_dtype`, or nullptr
    int64_t bias_stride;
    void* output;  ///< [R, N or N / 2] of `output_dtype`, out
    int64_t output_stride;
    const int64_t* row_addresses;  ///< [R] of each row of the output, instead of `output`; or
                                   ///< nullptr; without activation
    int num_groups;
    int64_t n;
    int64_t k_dim;
    DType dtype;  ///< of input and weights
    DType bias_dtype;
    DType output_dtype;
    int32_t* work_counters;  ///< [2] zeros, before and after; or nullptr
    GroupedGemmConfig config;
    Settled settled;  ///< may be read before the kernel ahead has ended
};

namespace cpu {
void grouped_gemm(const GroupedGemmArgs& args);
}
namespace cuda {
/// Offsets and slots are on the device, where no check has seen them: kernels keep offsets within
/// [0, num_rows] and read zeros, or some row of input, for a slot outside [0, X * slots_per_token).
void grouped_gemm(const GroupedGemmArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
