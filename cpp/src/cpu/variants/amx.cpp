// AMX: a matrix unit beside AVX-512, whose table does everything but the products of many rows.

#include "cpu/kernels/gemm_amx.hpp"

namespace moecore::cpu {
namespace {

/// The processor's tiles. Their configuration belongs to a thread: each call configures them and
/// releases them at its end, so that no one's context switches carry 8 KB of state. Written in
/// assembler: GCC's own wrappers take literal tile numbers only, and do not tell the compiler which
/// memory they use.
struct HardwareTiles {
    /// Tiles 0 .. 5 (sums and rows) have `num_rows` rows, 6 and 7 (the panel) sixteen lines.
    static void configure(int num_rows) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = 64;
            config.rows[tile] = static_cast<uint8_t>(tile < 6 ? num_rows : kTileRows);
        }
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    static void release() { asm volatile("tilerelease"); }
    template <int kTile>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" : : "n"(kTile));
    }
    template <int kTile>
    static void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(stride), "n"(kTile)
                     : "memory");
    }
    template <int kTile>
    static void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(to), "r"(stride), "n"(kTile)
                     : "memory");
    }
    /// Sums += rows times panel, over 32 of K.
    template <int kSums, int kRows, int kPanel>
    static void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                     :
                     : "n"(kSums), "n"(kRows), "n"(kPanel));
    }
};

}  // namespace

const KernelTable& amx_kernels() {
    static const KernelTable table = [] {
        KernelTable with_tiles = avx512_bf16_kernels();
        with_tiles.name = "amx";
        with_tiles.block_bf16 = multiply_block<HardwareTiles>;
        return with_tiles;
    }();
    return table;
}

}  // namespace moecore::cpu
