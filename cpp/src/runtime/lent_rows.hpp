#pragma once

#include <array>

#include "moecore/dispatcher.hpp"
#include "moecore/kernels/address_rows.hpp"
#include "moecore/kernels/share_rows.hpp"

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

/// Where this rank's rows go in the memory of all, and results in that of their owners.
struct SharedPlaces {
    std::array<ShareRowsArgs, 2> rows;  ///< whose targets are there; without rows
    AddressSlotsArgs back;              ///< without slots
};

/// Lends `memory`, [P, F, K] each, where the rows of rank r become [r], and `back`, a row for each
/// slot of this rank. Until the second finish_writes() this rank may write there. Collective.
SharedPlaces lend_shared(Transport& transport, const char* phase,
                         const std::array<TensorView, 2>& memory, const TensorView& back,
                         Stream stream);

/// Rows that every rank gets.
struct SharedRows {
    TensorView rows;  ///< [T, K] of this rank, T <= F
    bool is_padded;   ///< rows T .. F - 1 become 0xff everywhere, or stay as they are
};

/// Writes both to all ranks: they are there for what follows finish_writes().
void share_rows(const Transport& transport, const std::array<SharedRows, 2>& rows,
                const SharedPlaces& places, Stream stream);

/// Where each row of the experts goes: addresses[r] for the slot sorted_slots[r] among those of all
/// ranks. Both [P * S], int64 and int32; rows without a slot have no address.
void address_results(const SharedPlaces& places, const TensorView& sorted_slots,
                     const TensorView& addresses, Stream stream);

}  // namespace moecore
