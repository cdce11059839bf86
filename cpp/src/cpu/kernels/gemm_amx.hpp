#pragma once

// Panel products on a matrix unit. A step multiplies 32 of K; four tiles of sums are 16 rows x 64
// columns, or 32 rows x 32 columns where there are as many rows: four loads of factors for four
// products rather than five. The panel lies as the unit wants it. `Tiles` is the unit: the
// processor's, or a model of it in the tests.
//
// The unit adds the products of a step among themselves before it adds them to a sum, so the steps'
// places along K decide a sum's bits: always multiples of 32 from the row's first element. Rows
// per tile and blocks of K decide none.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kernel_table.hpp"

namespace moecore::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 16;
constexpr int kStepK = 32;
constexpr int64_t kPairBytes = int64_t{kPanelColumns} * 2 * 2;  ///< two of K in a panel
constexpr int64_t kSumsBytes = int64_t{kPanelColumns} * 4;      ///< a row of sums
constexpr int64_t kStepLines = kStepK / 2 * kPairBytes / 64;    ///< of memory, in a panel's step
constexpr int64_t kResidentK = 256;                             ///< 32 KB of a panel
constexpr int64_t kAheadOfPart = kResidentK / 2 * kPairBytes;   ///< bytes
constexpr int64_t kAheadOfStep = 16384;                         ///< bytes

/// Asks for a panel's lines in order, ahead of their use: tiles read every fourth line in turn,
/// which the processor's own prefetchers do not follow.
struct Ahead {
    const char* next;
    int64_t lines_per_step;

    void step() {
        for (int64_t i = 0; i < lines_per_step; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    }
};

/// Where four tiles of sums and their factors lie. As a pair: two tiles of rows, half the columns.
struct TilePlace {
    const uint16_t* rows;
    int64_t row_stride;  ///< elements
    const uint16_t* panel;
    float* sums;
    int rows_per_tile;
};

template <typename Tiles, bool kPair>
void add_step(const TilePlace& place) {
    constexpr int kPairedColumns = 2 * kTileColumns;  // a pair of K of a tile's columns
    const int64_t row_bytes = place.row_stride * 2;
    Tiles::template load<4>(place.rows, row_bytes);
    Tiles::template load<6>(place.panel, kPairBytes);
    Tiles::template multiply<0, 4, 6>();
    Tiles::template load<7>(place.panel + kPairedColumns, kPairBytes);
    Tiles::template multiply<1, 4, 7>();
    if constexpr (kPair) {
        Tiles::template load<5>(place.rows + place.rows_per_tile * place.row_stride, row_bytes);
        Tiles::template multiply<2, 5, 6>();
        Tiles::template multiply<3, 5, 7>();
    } else {
        Tiles::template load<6>(place.panel + 2 * kPairedColumns, kPairBytes);
        Tiles::template multiply<2, 4, 6>();
        Tiles::template load<7>(place.panel + 3 * kPairedColumns, kPairBytes);
        Tiles::template multiply<3, 4, 7>();
    }
}

/// The last k_count < 32 of K as a whole step, with zeros.
template <typename Tiles, bool kPair>
void add_last_step(const TilePlace& place, int64_t k_count) {
    alignas(64) uint16_t rows[2 * kTileRows][kStepK] = {};
    alignas(64) uint16_t panel[kStepK / 2][2 * kPanelColumns] = {};
    constexpr size_t kColumnBytes = kPairBytes / (kPair ? 2 : 1);
    for (int row = 0; row < place.rows_per_tile * (kPair ? 2 : 1); ++row)
        std::memcpy(rows[row], place.rows + row * place.row_stride,
                    static_cast<size_t>(k_count) * sizeof(uint16_t));
    for (int64_t pair = 0; 2 * pair < k_count; ++pair)
        std::memcpy(panel[pair], place.panel + pair * 2 * kPanelColumns, kColumnBytes);
    add_step<Tiles, kPair>({rows[0], kStepK, panel[0], nullptr, place.rows_per_tile});
}

template <typename Tiles, bool kPair>
void multiply_tiles(TilePlace place, int64_t k_count, bool accumulate, Ahead& ahead) {
    // The third and fourth tile: below the first ones, or beside them.
    float* other_sums =
        place.sums + (kPair ? place.rows_per_tile * kPanelColumns : 2 * kTileColumns);
    if (accumulate) {
        Tiles::template load<0>(place.sums, kSumsBytes);
        Tiles::template load<1>(place.sums + kTileColumns, kSumsBytes);
        Tiles::template load<2>(other_sums, kSumsBytes);
        Tiles::template load<3>(other_sums + kTileColumns, kSumsBytes);
    } else {
        Tiles::template zero<0>();
        Tiles::template zero<1>();
        Tiles::template zero<2>();
        Tiles::template zero<3>();
    }
    for (; k_count >= kStepK; k_count -= kStepK) {
        ahead.step();
        add_step<Tiles, kPair>(place);
        place.rows += kStepK;
        place.panel += kStepK * kPanelColumns;
    }
    if (k_count > 0) add_last_step<Tiles, kPair>(place, k_count);
    Tiles::template store<0>(place.sums, kSumsBytes);
    Tiles::template store<1>(place.sums + kTileColumns, kSumsBytes);
    Tiles::template store<2>(other_sums, kSumsBytes);
    Tiles::template store<3>(other_sums + kTileColumns, kSumsBytes);
}

template <typename Tiles>
void multiply_block(const GemmBlock& block) {
    // Tiles of equal height: one configuration serves all, and the last one runs over the end by
    // less than a row a tile.
    const int64_t num_tiles = (block.num_rows + kTileRows - 1) / kTileRows;
    const auto rows_per_tile = static_cast<int>((block.num_rows + num_tiles - 1) / num_tiles);
    // One tile of rows runs through K at once. Several take turns on a part of the panel that stays
    // in the first level cache, while the next part comes from memory.
    const int64_t part = num_tiles == 1 ? block.k_dim : kResidentK;
    Ahead ahead{
        reinterpret_cast<const char*>(block.panel) + (num_tiles == 1 ? kAheadOfStep : kAheadOfPart),
        block.is_streamed ? (kStepLines + num_tiles - 1) / num_tiles : 0};
    Tiles::configure(rows_per_tile);
    for (int64_t k = 0; k < block.k_dim; k += part) {
        const int64_t k_count = std::min(part, block.k_dim - k);
        const bool accumulate = block.accumulate || k > 0;
        TilePlace place{block.rows + k, block.row_stride, block.panel + k * kPanelColumns,
                        block.sums, rows_per_tile};
        int64_t tile = 0;
        for (; tile + 2 <= num_tiles; tile += 2) {
            TilePlace right = place;
            right.panel += kPanelColumns;  // half of 64 pairs
            right.sums += kPanelColumns / 2;
            multiply_tiles<Tiles, true>(place, k_count, accumulate, ahead);
            multiply_tiles<Tiles, true>(right, k_count, accumulate, ahead);
            place.rows += 2 * rows_per_tile * block.row_stride;
            place.sums += 2 * rows_per_tile * kPanelColumns;
        }
        if (tile < num_tiles) multiply_tiles<Tiles, false>(place, k_count, accumulate, ahead);
    }
    Tiles::release();
}

}  // namespace
}  // namespace moecore::cpu
