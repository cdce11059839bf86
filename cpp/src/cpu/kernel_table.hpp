#pragma once

// What one instruction set implements. cpu/variants/*.cpp fill one table each; the ops' CPU twins
// call through kernels(), which picks a table once per process.

#include <cstdint>

#include "moecore/kernels/combine.hpp"
#include "moecore/kernels/grouped_gemm.hpp"
#include "moecore/kernels/topk_routing.hpp"

namespace moecore::cpu {

inline constexpr int kPanelColumns = 64;  ///< output features of a packed panel
inline constexpr int kMaxTileRows = 6;    ///< rows one tile call handles
inline constexpr int kPackBlockK = 32;    ///< of K, packed at a time where N is contiguous; even

/// A product of up to kMaxTileRows rows with one panel.
/// bfloat16 panel: [ceil(K / 2)][64][2], the last half pair zero for an odd K. float32: [K][64].
struct GemmTile {
    const void* rows[kMaxTileRows];  ///< each row's first of k_dim elements
    const void* panel;
    int64_t k_dim;
    float* sums;      ///< [rows][64] float32
    bool accumulate;  ///< start from `sums` rather than from 0
};

/// A tile's way from float32 sums to the output tensor.
struct EpilogueTile {
    const float* sums;      ///< [num_rows][64]; gated: 32 gate columns, then their 32 up columns
    const float* bias;      ///< [64] in the same order, or nullptr
    void* output;           ///< first row's first element
    int64_t output_stride;  ///< elements between rows
    int num_rows;
    int num_columns;  ///< output columns to write: up to 64, or 32 if gated
    DType output_dtype;
    GroupedGemmConfig config;
};

/// Up to 16 rows of weights on their way into 16 neighbouring columns of a panel.
struct PackLanes {
    const void* source;  ///< first row, first k
    int64_t row_stride;  ///< elements between rows
    int64_t k_stride;    ///< elements between k
    int num_rows;        ///< <= 16; the other columns become 0
    int place_in_pair;   ///< 0 or 1: row_stride is 2, and the element after (before) each row's
                         ///< may be read too; else -1
    int64_t k_dim;
    void* panel;  ///< the panel's first k, at these columns
};

struct KernelTable {
    const char* name;
    void (*route)(const TopkRoutingArgs& args, int64_t begin, int64_t end);
    void (*tile_bf16[kMaxTileRows + 1])(const GemmTile& tile);  ///< by number of rows, [0] unused
    void (*tile_f32[kMaxTileRows + 1])(const GemmTile& tile);
    void (*epilogue)(const EpilogueTile& tile);
    void (*pack_bf16)(const PackLanes& lanes);
    void (*pack_f32)(const PackLanes& lanes);
    void (*combine)(const CombineArgs& args, int64_t begin, int64_t end);
};

const KernelTable& scalar_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512_bf16_kernels();

/// The table in use. Throws InvalidArgument if MOECORE_CPU_ISA names none that runs here.
const KernelTable& kernels();

}  // namespace moecore::cpu
