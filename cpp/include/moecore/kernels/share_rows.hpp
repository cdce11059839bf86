#pragma once

#include <array>
#include <cstdint>

#include "moecore/stream.hpp"

namespace moecore {

/// Rows that every one of several ranks gets. Built by runtime/lent_rows.cpp. Sizes in bytes.
struct ShareRowsArgs {
    static constexpr int kMaxRanks = 64;

    const void* source;     ///< [num_rows] rows
    int64_t source_stride;  ///< from row to row
    int64_t num_rows;
    int64_t padded_rows;  ///< >= num_rows, of each target: those beyond num_rows are all 0xff
    int64_t row_bytes;    ///< even, > 0
    int num_targets;
    int64_t targets[kMaxRanks];  ///< address of the first row of each
};

namespace cpu {
void share_rows(const ShareRowsArgs& args);
}
namespace cuda {
/// Two kinds of rows, in one launch.
void share_rows(const std::array<ShareRowsArgs, 2>& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
