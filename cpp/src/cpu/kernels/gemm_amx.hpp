#pragma once

// Panel products on a matrix unit: 16 rows x 64 columns are four tiles of sums; each step multiplies
// 32 of K of the rows (one tile) with the panel's (four tiles, which lie there as the unit wants
// them). `Tiles` is the unit: the processor's, or a model of it in the tests.
//
// The unit adds the products of a step among themselves before it adds them to a sum, so the steps'
// places along K decide a sum's bits: always multiples of 32 from the row's first element. Rows
// per tile and blocks of K decide none.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/kernel_table.hpp"

namespace moecore::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kStepK = 32;
constexpr int kTileColumns = 16;
constexpr int64_t kPanelStride = int64_t{kPanelColumns} * 2 * 2;  ///< bytes of a pair of K
constexpr int64_t kSumsStride = int64_t{kPanelColumns} * 4;       ///< bytes

inline int64_t tune(const char* name, int64_t def) {
    const char* v = std::getenv(name);
    return v ? std::atoll(v) : def;
}
static const int64_t kResidentK = tune("T_KB", 256);
static const int64_t kDist1 = tune("T_D1", 8192);
static const int64_t kDistN = tune("T_DN", 32768);
static const int64_t kHint = tune("T_HINT", 1);

/// Asks for lines of the panel in order, ahead of their use.
struct Ahead {
    const char* next;
    int64_t lines;  ///< a step

    void step() {
        if (kHint == 1)
            for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
        else
            for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 3);
    }
};

template <typename Tiles>
void add_step(const void* rows, int64_t row_stride, const char* lines, int64_t line_stride) {
    Tiles::template load<4>(rows, row_stride);
    Tiles::template load<5>(lines, line_stride);
    Tiles::template multiply<0, 4, 5>();
    Tiles::template load<6>(lines + 64, line_stride);
    Tiles::template multiply<1, 4, 6>();
    Tiles::template load<7>(lines + 128, line_stride);
    Tiles::template multiply<2, 4, 7>();
    Tiles::template load<5>(lines + 192, line_stride);
    Tiles::template multiply<3, 4, 5>();
}

template <typename Tiles>
void load_sums(const float* sums, bool accumulate) {
    if (!accumulate) {
        Tiles::template zero<0>();
        Tiles::template zero<1>();
        Tiles::template zero<2>();
        Tiles::template zero<3>();
        return;
    }
    Tiles::template load<0>(sums, kSumsStride);
    Tiles::template load<1>(sums + kTileColumns, kSumsStride);
    Tiles::template load<2>(sums + 2 * kTileColumns, kSumsStride);
    Tiles::template load<3>(sums + 3 * kTileColumns, kSumsStride);
}

template <typename Tiles>
void store_sums(float* sums) {
    Tiles::template store<0>(sums, kSumsStride);
    Tiles::template store<1>(sums + kTileColumns, kSumsStride);
    Tiles::template store<2>(sums + 2 * kTileColumns, kSumsStride);
    Tiles::template store<3>(sums + 3 * kTileColumns, kSumsStride);
}

/// The last k_dim % 32 of K as a whole step, with zeros.
template <typename Tiles>
void add_last_step(const uint16_t* rows, int64_t row_stride, int num_rows, const uint16_t* panel,
                   int64_t k_count) {
    alignas(64) uint16_t padded_rows[kTileRows][kStepK] = {};
    alignas(64) uint16_t padded_panel[kStepK * kPanelColumns] = {};
    const auto row_bytes = static_cast<size_t>(k_count) * sizeof(uint16_t);
    for (int row = 0; row < num_rows; ++row)
        std::memcpy(padded_rows[row], rows + row * row_stride, row_bytes);
    const int64_t num_pairs = (k_count + 1) / 2;
    std::memcpy(padded_panel, panel, static_cast<size_t>(num_pairs * kPanelStride));
    add_step<Tiles>(padded_rows, sizeof padded_rows[0],
                    reinterpret_cast<const char*>(padded_panel), kPanelStride);
}

/// `num_tiles` tiles of `rows_per_tile` rows each, from `first_row` on.
template <typename Tiles>
void multiply_tiles(const GemmBlock& block, int64_t first_row, int64_t num_tiles,
                    int rows_per_tile) {
    Tiles::configure(rows_per_tile);
    // One tile of rows runs through K at once. Several take turns on a part of the panel that stays
    // in the first level cache, while the next part comes from memory.
    const int64_t part = num_tiles == 1 ? std::max<int64_t>(block.k_dim, 1) : kResidentK;
    const int64_t distance = num_tiles == 1 ? kDist1 : kDistN;
    Ahead ahead{reinterpret_cast<const char*>(block.panel) + distance,
                block.is_streamed && distance > 0 ? (kStepK / 2 * 4 + num_tiles - 1) / num_tiles : 0};
    for (int64_t begin = 0; begin < block.k_dim; begin += part) {
        const int64_t end = std::min(begin + part, block.k_dim);
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
            const int64_t row = first_row + tile * rows_per_tile;
            const uint16_t* rows = block.rows + row * block.row_stride;
            float* sums = block.sums + row * kPanelColumns;
            load_sums<Tiles>(sums, block.accumulate || begin > 0);
            int64_t k = begin;
            for (; k + kStepK <= end; k += kStepK) {
                ahead.step();
                add_step<Tiles>(rows + k, block.row_stride * 2,
                                reinterpret_cast<const char*>(block.panel + k * kPanelColumns),
                                kPanelStride);
            }
            if (k < end)
                add_last_step<Tiles>(rows + k, block.row_stride, rows_per_tile,
                                     block.panel + k * kPanelColumns, end - k);
            store_sums<Tiles>(sums);
        }
    }
}

template <typename Tiles>
void multiply_block(const GemmBlock& block) {
    const int64_t num_tiles = block.num_rows / kTileRows;
    const auto rest = static_cast<int>(block.num_rows % kTileRows);
    if (num_tiles > 0) multiply_tiles<Tiles>(block, 0, num_tiles, kTileRows);
    if (rest > 0) multiply_tiles<Tiles>(block, num_tiles * kTileRows, 1, rest);
    Tiles::release();
}

}  // namespace
}  // namespace moecore::cpu
