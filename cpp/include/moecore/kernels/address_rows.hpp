#pragma once

#include <array>
#include <cstdint>

#include "moecore/stream.hpp"

namespace moecore {

/// Where each of N rows goes that cross to other ranks. The rows come in parts that lie side by
/// side, each somewhere else. Built by runtime/lent_rows.cpp.
struct AddressRowsArgs {
    static constexpr int kMaxParts = 64;

    const int32_t* index;  ///< [N] the i-th row that crosses is row index[i]; or nullptr: row i
    int64_t* addresses;    ///< [N] of each row, out
    int64_t num_rows;      ///< N
    int64_t row_bytes;
    int num_parts;
    int64_t firsts[kMaxParts];   ///< of the rows that cross, of each part; non-decreasing
    int64_t targets[kMaxParts];  ///< address of the first row of each part
};

namespace cuda {
/// Several, in one launch.
void address_rows(const std::array<AddressRowsArgs, 2>& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
