#pragma once

#include <array>

#include "moecore/dispatcher.hpp"
#include "moecore/kernels/address_rows.hpp"

namespace moecore {

/// Rows that cross to other ranks, by (group, rank), written by the kernels that make or read them.
struct CrossingRows {
    const RowCounts& sent;      ///< of this rank's rows
    const RowCounts& received;  ///< of those that arrive at it
    TensorView memory;          ///< [received.total(), K], lent: where they arrive
    TensorView index;      ///< [N] int32: the i-th row that crosses is row index[i]; absent: row i
    TensorView addresses;  ///< [N] int64, out: where each row goes
};

/// Whether rows that cross by themselves can go so: kernels of every rank write to the memory of
/// every other.
bool can_lend_rows(const Transport& transport, int num_groups);

/// Lends the memory of both to every rank, and finds out where this rank's rows go. What is put on
/// `stream` from then on may write there, until the second finish_writes(). Collective. Throws
/// TransportError if a rank does not expect what this one sends.
void lend_rows(Transport& transport, const std::array<CrossingRows, 2>& rows, Stream stream);

/// Rows that every rank gets of every other.
struct SharedRows {
    TensorView rows;    ///< [T, K] of this rank, T <= F
    TensorView memory;  ///< [P, F, K], lent: where those of rank r become memory[r]
    bool is_padded;     ///< rows T .. F - 1 become 0xff everywhere, or stay as they are
};

/// Lends the memory of both and `back` to every rank, writes this rank's rows to all, and returns
/// when every rank's are in place for what `stream` gets next. Until the next finish_writes() it
/// may write to the others' `back`. Collective.
///
/// back        [S, K], lent: a row for each slot of this rank
/// Returns, for address_slots, where each rank's `back` is.
AddressSlotsArgs share_rows(Transport& transport, const char* phase,
                            const std::array<SharedRows, 2>& shared, const TensorView& back,
                            Stream stream);

}  // namespace moecore
