#pragma once

#include <cstddef>
#include <cstdint>

#include "moecore/stream.hpp"

namespace moecore {

/// What every gather_rows kernel takes. Built and checked by ops/gather_rows.cpp. Sizes in bytes.
struct GatherRowsArgs {
    const void* input;         ///< [N] rows
    const int32_t* index;      ///< [M], -1 for none; or nullptr: row i of input
    void* output;              ///< [M] rows, out
    const int64_t* addresses;  ///< [M] of each row of the output, instead of `output`; or nullptr
    int64_t num_inputs;        ///< N
    int64_t num_outputs;       ///< M >= 0
    int slots_per_row;         ///< >= 1; index / slots_per_row is the row of input
    int64_t row_bytes;         ///< even, > 0; if a multiple of 16, so are the addresses
    int64_t input_stride;
    int64_t output_stride;
};

namespace cpu {
void gather_rows(const GatherRowsArgs& args);
}
namespace cuda {
/// An index outside [0, num_inputs * slots_per_row) leaves its row as it is.
void gather_rows(const GatherRowsArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
