// The AMX product's way through rows, K and panels, on a model of the tiles: it runs on any
// processor, and where there is AMX the processor's tiles must give the same bits.

#include <algorithm>

#include "cpu/isa.hpp"
#include "cpu/kernels/gemm_amx.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

using namespace moecore::cpu;

/// Tiles as Intel's manual describes tdpbf16ps, for numbers that do not underflow.
struct ModelTiles {
    static inline int num_rows = 0;  ///< 0: released
    static inline char bytes[8][16][64];

    static int rows_of(int tile) { return tile < 6 ? num_rows : 16; }
    static void configure(int rows) {
        expect(rows >= 1 && rows <= 16, "1 to 16 rows");
        num_rows = rows;
    }
    static void release() { num_rows = 0; }
    template <int kTile>
    static void zero() {
        std::memset(bytes[kTile], 0, sizeof bytes[kTile]);
    }
    template <int kTile>
    static void load(const void* from, int64_t stride) {
        for (int row = 0; row < rows_of(kTile); ++row)
            std::memcpy(bytes[kTile][row], static_cast<const char*>(from) + row * stride, 64);
    }
    template <int kTile>
    static void store(void* to, int64_t stride) {
        for (int row = 0; row < rows_of(kTile); ++row)
            std::memcpy(static_cast<char*>(to) + row * stride, bytes[kTile][row], 64);
    }
    template <int kSums, int kRows, int kPanel>
    static void multiply() {
        for (int row = 0; row < num_rows; ++row)
            for (int column = 0; column < 16; ++column) {
                float even = 0.0f, odd = 0.0f, sum;
                for (int pair = 0; pair < 16; ++pair) {
                    even = std::fma(element(kRows, row, 2 * pair),
                                    element(kPanel, pair, 2 * column), even);
                    odd = std::fma(element(kRows, row, 2 * pair + 1),
                                   element(kPanel, pair, 2 * column + 1), odd);
                }
                char* at = bytes[kSums][row] + 4 * column;
                std::memcpy(&sum, at, sizeof sum);
                sum += even + odd;
                std::memcpy(at, &sum, sizeof sum);
            }
    }

private:
    static float element(int tile, int row, int index) {
        uint16_t bits;
        std::memcpy(&bits, bytes[tile][row] + 2 * index, sizeof bits);
        return std::bit_cast<float>(uint32_t{bits} << 16);
    }
};

/// One product's operands. Memory ends where a product may read no further, so that
/// AddressSanitizer sees it.
struct Product {
    Product(Random& random, int64_t num_rows, int64_t k_dim, int64_t gap)
        : num_rows(num_rows),
          k_dim(k_dim),
          row_stride(k_dim + gap),
          rows(random.array(kBf16, strided_size(num_rows + spare_rows(), k_dim, row_stride))),
          panel(random.array(kBf16, (k_dim + k_dim % 2) * 64)) {
        if (k_dim % 2 == 0) return;
        for (int64_t column = 0; column < 64; ++column) panel.set(place(k_dim, column), 0.0);
    }

    int64_t spare_rows() const { return num_rows > 16 ? 15 : 0; }
    static int64_t place(int64_t k, int64_t column) { return k / 2 * 128 + 2 * column + k % 2; }

    /// Rows first .. first + count - 1, from k on, added to what `sums` holds if k > 0.
    void multiply(void (*kernel)(const GemmBlock&), int64_t first, int64_t count, int64_t k,
                  int64_t k_count, Array& sums) {
        kernel({.rows = static_cast<uint16_t*>(rows.data()) + first * row_stride + k,
                .row_stride = row_stride,
                .num_rows = count,
                .panel = static_cast<uint16_t*>(panel.data()) + k * 64,
                .k_dim = k_count,
                .sums = static_cast<float*>(sums.data()) + first * 64,
                .accumulate = k > 0,
                .is_streamed = k % 64 == 0});
    }
    Array multiply(void (*kernel)(const GemmBlock&)) {
        Array sums = new_sums();
        multiply(kernel, 0, num_rows, 0, k_dim, sums);
        return first_rows(sums);
    }

    Array new_sums() const { return Random(9).array(kF32, (num_rows + spare_rows()) * 64); }
    Array first_rows(Array& sums) const {
        Array result(kF32, num_rows * 64);
        std::memcpy(result.data(), sums.data(), result.bytes().size());
        return result;
    }

    int64_t num_rows, k_dim, row_stride;
    Array rows, panel;
};

/// Calls fn(product, what) for the sizes around every edge of the tiles.
template <typename Fn>
void for_each_product(Fn&& fn) {
    Random random(21);
    int turn = 0;
    for (const int64_t num_rows : {1, 2, 15, 16, 17, 32, 37, 49})
        for (const int64_t k_dim : {1, 2, 31, 32, 33, 64, 255, 256, 257, 577}) {
            Product product(random, num_rows, k_dim, ++turn % 3);
            fn(product, concat(num_rows, " rows, K ", k_dim));
        }
}

void test_tiles_multiply_rows_with_a_panel() {
    for_each_product([](Product& product, const std::string& what) {
        const Array sums = product.multiply(multiply_block<ModelTiles>);
        expect(ModelTiles::num_rows == 0, "tiles must be released, " + what);
        for (int64_t row = 0; row < product.num_rows; ++row)
            for (int64_t column = 0; column < 64; ++column) {
                double wanted = 0.0, bound = 0.0;
                for (int64_t k = 0; k < product.k_dim; ++k) {
                    const double term = product.rows[row * product.row_stride + k] *
                                        product.panel[Product::place(k, column)];
                    wanted += term;
                    bound += std::abs(term);
                }
                bound *= static_cast<double>(2 * product.k_dim + 2) * kEps;
                expect_close(sums[row * 64 + column], wanted, bound, kF32,
                             concat("row ", row, " column ", column, ", ", what));
            }
    });
}

void test_tiles_give_a_row_the_same_bits_in_any_company() {
    for_each_product([](Product& product, const std::string& what) {
        const Array together = product.multiply(multiply_block<ModelTiles>);
        Array alone = product.new_sums(), parts = product.new_sums();
        for (int64_t row = 0; row < product.num_rows; ++row)
            product.multiply(multiply_block<ModelTiles>, row, 1, 0, product.k_dim, alone);
        expect(product.first_rows(alone).bytes() == together.bytes(), "row by row, " + what);
        for (int64_t k = 0; k < product.k_dim; k += 96)
            product.multiply(multiply_block<ModelTiles>, 0, product.num_rows, k,
                             std::min<int64_t>(96, product.k_dim - k), parts);
        expect(product.first_rows(parts).bytes() == together.bytes(), "K in parts, " + what);
    });
}

void test_the_processor_s_tiles_are_those_of_the_model() {
    for (const KernelTable* table : supported_kernels()) {
        if (table->block_bf16 == nullptr) continue;
        for_each_product([&](Product& product, const std::string& what) {
            expect(product.multiply(table->block_bf16).bytes() ==
                       product.multiply(multiply_block<ModelTiles>).bytes(),
                   concat(table->name, ", ", what));
        });
    }
}

}  // namespace

void add_gemm_amx_tests(std::vector<Test>& tests) {
    tests.insert(tests.end(),
                 {{"tiles_multiply_rows_with_a_panel", test_tiles_multiply_rows_with_a_panel},
                  {"tiles_give_a_row_the_same_bits_in_any_company",
                   test_tiles_give_a_row_the_same_bits_in_any_company},
                  {"the_processor_s_tiles_are_those_of_the_model",
                   test_the_processor_s_tiles_are_those_of_the_model}});
}

}  // namespace moecore::test
