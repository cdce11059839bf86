#pragma once

// What one instruction set implements. cpu/variants/*.cpp fill one table each; the ops' CPU twins
// call through kernels(), which picks a table once per process.

#include <cstdint>

#include "moecore/kernels/combine.hpp"
#include "moecore/kernels/draw_tokens.hpp"
#include "moecore/kernels/grouped_gemm.hpp"
#include "moecore/kernels/rms_norm.hpp"
#include "moecore/kernels/rotary_embedding.hpp"
#include "moecore/kernels/topk_routing.hpp"

namespace moecore::cpu {

inline constexpr int kPanelColumns = 64;   ///< output features of a packed panel
inline constexpr int kMaxTileRows = 6;     ///< rows one tile call handles
inline constexpr int kPackBlockK = 32;     ///< of K, packed at a time where N is contiguous; even
inline constexpr int kPackRunBytes = 256;  ///< of a row, packed at a time out of caches

/// A product of up to kMaxTileRows rows with one panel.
/// bfloat16 panel: [ceil(K / 2)][64][2], the last half pair zero for an odd K. float32: [K][64].
struct GemmTile {
    const void* rows[kMaxTileRows];  ///< each row's first of k_dim elements
    const void* panel;
    int64_t k_dim;
    float* sums;                      ///< [rows][64] float32
    bool accumulate;                  ///< start from `sums` rather than from 0
    int num_columns = kPanelColumns;  ///< the panel's first 32, or all
};

/// A product of any number of evenly spaced bfloat16 rows with one panel, as GemmTile lays it out.
/// If there are more than 16, up to 15 rows after the last may be read too, and their sums written.
struct GemmBlock {
    const uint16_t* rows;  ///< the first row's first of k_dim elements
    int64_t row_stride;    ///< elements between rows
    int64_t num_rows;      ///< >= 1
    const uint16_t* panel;
    int64_t k_dim;
    float* sums;       ///< [num_rows][64] float32
    bool accumulate;   ///< start from `sums` rather than from 0
    bool is_streamed;  ///< the panel comes from memory, and what follows it is likely to be next
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
    const void* source;      ///< first row, first k
    int64_t row_stride;      ///< elements between rows
    int64_t k_stride;        ///< elements between k
    int num_rows;            ///< <= 16; the other columns become 0
    int place_in_pair = -1;  ///< 0 or 1: row_stride is 2, and the element after (before) each
                             ///< row's may be read too; else -1
    int64_t k_dim;
    void* panel;               ///< the panel's first k, at these columns
    bool past_caches = false;  ///< the panel is read much later, if at all by this thread: others
                               ///< see it after flush_stores
};

/// Scores of up to kMaxTileRows rows with one block of 64 keys, on their way to weights
/// 2^(scale * (score - maximum)). What the row has added up before is scaled to its new maximum.
struct SoftmaxTile {
    const float* scores;   ///< [num_rows][64]
    void* weights;         ///< [num_rows][64] of `dtype`, out
    float* maxima;         ///< [num_rows] largest score so far, in and out
    float* sums;           ///< [num_rows][16] of weights so far, in and out
    float* output;         ///< [num_panels][num_rows][64] of weighted values, in and out
    int64_t panel_stride;  ///< elements between the panels of `output`
    int num_panels;
    int num_rows;
    int num_keys[kMaxTileRows];  ///< of the 64 that the row sees: the others weigh 0
    bool is_first;               ///< nothing has been added up yet
    float scale;
    DType dtype;
};

/// A finished row: its weighted values over the sum of its weights.
struct AttentionRow {
    const float* output;   ///< [panels][64]
    int64_t panel_stride;  ///< elements between the panels
    const float* sums;     ///< [16]
    int64_t head_dim;
    void* target;  ///< [head_dim] of `dtype`, out
    DType dtype;
};

struct KernelTable {
    const char* name;
    void (*route)(const TopkRoutingArgs& args, int64_t begin, int64_t end);
    void (*tile_bf16[kMaxTileRows + 1])(const GemmTile& tile);  ///< by number of rows, [0] unused
    void (*tile_f32[kMaxTileRows + 1])(const GemmTile& tile);
    void (*epilogue)(const EpilogueTile& tile);
    void (*pack_bf16)(const PackLanes& lanes);
    void (*pack_f32)(const PackLanes& lanes);
    void (*flush_stores)();
    void (*combine)(const CombineArgs& args, int64_t begin, int64_t end);
    void (*rms_norm)(const RmsNormArgs& args, int64_t begin, int64_t end);  ///< of T * n rows
    void (*rotary_embedding)(const RotaryEmbeddingArgs& args, int64_t begin, int64_t end);
    void (*softmax)(const SoftmaxTile& tile);
    bool (*attention_row)(const AttentionRow& row);  ///< false if an element is not finite
    void (*draw_tokens)(const DrawTokensArgs& args, int64_t begin, int64_t end);
    /// Where a matrix unit multiplies: then grouped_gemm takes it rather than tile_bf16.
    void (*block_bf16)(const GemmBlock& block) = nullptr;
};

const KernelTable& scalar_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512_bf16_kernels();
const KernelTable& amx_kernels();

/// The table in use. Throws InvalidArgument if MOECORE_CPU_ISA names none that runs here.
const KernelTable& kernels();

}  // namespace moecore::cpu
