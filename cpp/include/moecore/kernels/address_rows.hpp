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

/// Where the result of each of N slots goes, of which every rank has as many. Built likewise.
struct AddressSlotsArgs {
    const int32_t* slots;    ///< [N] slot of each row; outside [0, N): the row goes nowhere
    int64_t* addresses;      ///< [N] of each row, out
    int64_t num_slots;       ///< N
    int64_t slots_per_rank;  ///< N / ranks
    int64_t row_bytes;
    int64_t targets[AddressRowsArgs::kMaxParts];  ///< address of each rank's first slot
};

namespace cpu {
void address_rows(const AddressRowsArgs& args);
void address_slots(const AddressSlotsArgs& args);
}  // namespace cpu
namespace cuda {
/// Two kinds of rows, in one launch.
void address_rows(const std::array<AddressRowsArgs, 2>& args, Stream stream);
void address_slots(const AddressSlotsArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
