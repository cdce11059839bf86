#include <algorithm>

#include "moecore/grouped_gemm.hpp"
#include "moecore/packed_weights.hpp"
#include "moecore/threads.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

struct GemmCase {
    DType dtype = kF32;
    DType output_dtype = kF32;
    int64_t n = 1, k_dim = 1;
    std::vector<int64_t> offsets = {0, 1};
    GroupedGemmConfig config;
    bool with_bias = false;
    DType bias_dtype = kF32;
    bool gather = false;
    int64_t gap = 0;  ///< between rows of input and output
};

double activate(const GroupedGemmConfig& config, double g, double u) {
    switch (config.activation) {
        case Activation::kNone:
            return g;
        case Activation::kSwiglu:
            return g * sigmoid(g) * u;
        case Activation::kClampedSwiglu: {
            const double limit = config.limit;
            g = std::min(g, limit);
            u = std::clamp(u, -limit, limit);
            return g * sigmoid(config.alpha * g) * (u + config.up_offset);
        }
        case Activation::kGeluTanh:
            return 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u;
    }
    return 0.0;
}

/// Runs one case with plain weights of both orders and packed ones, on one thread and on two: all
/// six have the same bits, and those are near the float64 result.
void check_gemm(const GemmCase& c) {
    Random random(static_cast<uint32_t>(c.n * 1000 + c.k_dim * 10 + c.gap));
    const bool gated = is_gated(c.config.activation);
    const bool interleaved = c.config.gate_order == GateOrder::kInterleaved;
    const auto num_groups = static_cast<int64_t>(c.offsets.size()) - 1;
    const int64_t width = gated ? c.n / 2 : c.n;
    const int64_t num_rows = c.offsets.back();
    constexpr int64_t kSlotsPerToken = 3;
    const int64_t num_inputs = c.gather ? std::max<int64_t>(1, num_rows / 2) : num_rows;
    const int64_t in_stride = c.k_dim + c.gap, out_stride = width + c.gap;

    Array input = random.array(c.dtype, strided_size(num_inputs, c.k_dim, in_stride));
    Array weights = random.array(c.dtype, num_groups * c.n * c.k_dim);  // [G, N, K]
    Array transposed(c.dtype, weights.size());                          // [G, K, N]
    for (int64_t g = 0; g < num_groups; ++g)
        for (int64_t n = 0; n < c.n; ++n)
            for (int64_t k = 0; k < c.k_dim; ++k)
                transposed.set((g * c.k_dim + k) * c.n + n, weights[(g * c.n + n) * c.k_dim + k]);
    TensorView plain = weights.view({num_groups, c.n, c.k_dim});
    TensorView plain_transposed = transposed.view({num_groups, c.n, c.k_dim});
    plain_transposed.strides = {c.n * c.k_dim, 1, c.n, 0};
    PackedWeights packed(c.dtype, num_groups, c.n, c.k_dim, gated);
    PackedWeights packed_transposed(c.dtype, num_groups, c.n, c.k_dim, gated);
    for (int64_t g = 0; g < num_groups; ++g)
        for (const bool t : {false, true}) {
            const int64_t row_stride = t ? 1 : c.k_dim, k_stride = t ? c.n : 1;
            char* base = static_cast<char*>(t ? transposed.data() : weights.data());
            const auto matrix = [&](int64_t first_row, int64_t rows, int64_t step) {
                TensorView view(base + (g * c.n * c.k_dim + first_row * row_stride) *
                                           static_cast<int64_t>(size_of(c.dtype)),
                                c.dtype, {rows, c.k_dim});
                view.strides = {row_stride * step, k_stride, 0, 0};
                return view;
            };
            PackedWeights& target = t ? packed_transposed : packed;
            if (!gated)
                target.pack(g, matrix(0, c.n, 1));
            else if (interleaved)
                target.pack_gated(g, matrix(0, width, 2), matrix(1, width, 2));
            else
                target.pack_gated(g, matrix(0, width, 1), matrix(width, width, 1));
        }
    Array bias = random.array(c.bias_dtype, c.with_bias ? num_groups * c.n : 0);
    Array offsets = int_array(DType::kInt64, c.offsets);
    Array slots(DType::kInt32, c.gather ? num_rows : 0);
    for (int64_t r = 0; r < slots.size(); ++r)
        slots.set(r, static_cast<double>(random.below(num_inputs * kSlotsPerToken)));

    const Array untouched = [&] {
        Array array(c.output_dtype, strided_size(num_rows, width, out_stride));
        array.fill(-99);
        return array;
    }();
    const auto run = [&](const GroupedGemmWeights& w, int threads) {
        Array output = untouched;
        set_num_threads(threads);
        grouped_gemm(
            input.rows(num_inputs, c.k_dim, in_stride), w,
            c.with_bias ? bias.view({num_groups, c.n}) : TensorView{},
            offsets.view({num_groups + 1}), c.gather ? slots.view({num_rows}) : TensorView{},
            c.gather ? kSlotsPerToken : 1, c.config, output.rows(num_rows, width, out_stride));
        return output;
    };
    const Array output = run(plain, 1);
    const std::string what =
        concat(name_of(c.dtype), " to ", name_of(c.output_dtype), " N ", c.n, " K ", c.k_dim,
               " activation ", int(c.config.activation), " interleaved ", interleaved, " bias ",
               c.with_bias, " gather ", c.gather, " gap ", c.gap);
    for (const int threads : {1, 2}) {
        expect(run(plain, threads).bytes() == output.bytes(), "plain bits, " + what);
        expect(run(plain_transposed, threads).bytes() == output.bytes(),
               "transposed bits, " + what);
        expect(run(packed, threads).bytes() == output.bytes(), "packed bits, " + what);
        expect(run(packed_transposed, threads).bytes() == output.bytes(),
               "packed from transposed bits, " + what);
    }

    struct Dot {
        double value, bound;
    };
    const auto dot = [&](int64_t group, int64_t row, int64_t feature) {
        const int64_t source = c.gather ? static_cast<int64_t>(slots[row]) / kSlotsPerToken : row;
        Dot result{0.0, 0.0};
        for (int64_t k = 0; k < c.k_dim; ++k) {
            const double product =
                input[source * in_stride + k] * weights[(group * c.n + feature) * c.k_dim + k];
            result.value += product;
            result.bound += std::abs(product);
        }
        if (c.with_bias) {
            result.value += bias[group * c.n + feature];
            result.bound += std::abs(bias[group * c.n + feature]);
        }
        // K products and K + 1 additions, each rounded once, on partial sums below sum(|products|).
        result.bound *= static_cast<double>(2 * c.k_dim + 2) * kEps;
        return result;
    };
    std::vector<bool> written(static_cast<size_t>(output.size()));
    for (int64_t g = 0; g < num_groups; ++g)
        for (int64_t r = c.offsets[static_cast<size_t>(g)];
             r < c.offsets[static_cast<size_t>(g) + 1]; ++r)
            for (int64_t f = 0; f < width; ++f) {
                written[static_cast<size_t>(r * out_stride + f)] = true;
                const double actual = output[r * out_stride + f];
                const std::string where =
                    concat("group ", g, " row ", r, " feature ", f, ", ", what);
                const Dot gate = dot(g, r, gated && interleaved ? 2 * f : f);
                if (!gated) {
                    expect_close(actual, gate.value, gate.bound, c.output_dtype, where);
                    continue;
                }
                const Dot up = dot(g, r, interleaved ? 2 * f + 1 : width + f);
                const double wanted = activate(c.config, gate.value, up.value);
                // |d/dg| <= 1.13 (|u| + offset), |d/du| <= |g|; the function itself loses a dozen
                // roundings, relative to g (u + offset), which bounds the result.
                const double u = std::abs(up.value) + 1.0, gv = std::abs(gate.value);
                const double bound =
                    1.2 * gate.bound * (u + up.bound) + up.bound * gv + 16 * kEps * gv * u;
                expect_close(actual, wanted, bound, c.output_dtype, where);
            }
    for (int64_t i = 0; i < output.size(); ++i)
        expect(written[static_cast<size_t>(i)] || output[i] == untouched[i],
               concat("element ", i, " belongs to no group and must not change, ", what));
}

void test_gemm_matches_float64_at_odd_sizes() {
    int64_t turn = 0;
    for (const DType dtype : {kF32, kBf16})
        for (const int64_t n : {1, 31, 65, 577})
            for (const int64_t k_dim : {1, 31, 65, 577})
                for (const Activation activation :
                     {Activation::kNone, Activation::kSwiglu, Activation::kClampedSwiglu,
                      Activation::kGeluTanh})
                    for (const GateOrder order :
                         {GateOrder::kConcatenated, GateOrder::kInterleaved}) {
                        const bool gated = is_gated(activation);
                        if (!gated && order == GateOrder::kInterleaved) continue;
                        ++turn;
                        const int64_t first = turn % 3, second = turn % 13 + 1;
                        GemmCase c;
                        c.dtype = dtype;
                        c.output_dtype = turn % 2 == 0 ? kF32 : kBf16;
                        c.n = !gated || n == 577 ? n + (gated ? 1 : 0) : 2 * n;
                        c.k_dim = k_dim;
                        c.offsets = {first, first + second, first + second, first + second + 1,
                                     first + second + 1};
                        c.config.activation = activation;
                        c.config.gate_order = order;
                        c.config.limit = 1.5f;
                        c.with_bias = turn % 3 != 0;
                        c.bias_dtype = turn % 5 < 2 ? dtype : kF32;
                        c.gather = turn % 4 < 2;
                        c.gap = turn % 7 < 3 ? 0 : turn % 7;
                        check_gemm(c);
                    }
}

void test_gemm_matches_float64_around_the_edges_of_tiles() {
    for (const DType dtype : {kF32, kBf16})
        for (const bool gated : {false, true})
            for (const int64_t rows :
                 {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 31, 32, 33, 50}) {
                GemmCase c;
                c.dtype = dtype;
                c.output_dtype = dtype;
                c.n = 66;
                c.k_dim = 33;
                c.offsets = {0, 0, rows, rows + rows % 3};
                c.config.activation = gated ? Activation::kSwiglu : Activation::kNone;
                c.gather = rows % 2 == 0;
                check_gemm(c);
            }
}

void test_gemm_cuts_long_groups_and_long_k() {
    GemmCase c;
    c.n = 70;
    c.k_dim = 1030;  // three blocks of K when plain
    c.offsets = {0, 0, 250, 257};
    check_gemm(c);
    c.dtype = c.output_dtype = kBf16;
    c.gather = true;
    check_gemm(c);
}

void test_gemm_of_no_rows_writes_nothing() {
    GemmCase c;
    c.n = 5;
    c.k_dim = 3;
    c.offsets = {0, 0, 0};
    check_gemm(c);
    c.dtype = kBf16;
    check_gemm(c);
}

void test_gemm_reads_any_stride_of_a_dimension_of_one() {
    Random random(3);
    for (const DType dtype : {kF32, kBf16})
        for (const bool one_column : {false, true}) {
            const int64_t n = one_column ? 7 : 1, k_dim = one_column ? 1 : 7;
            Array input = random.array(dtype, 2 * k_dim), weights = random.array(dtype, 6 * 3 + 1);
            Array output(kF32, 2 * n);
            TensorView weight = weights.view({n, k_dim});
            weight.strides = one_column ? decltype(weight.strides){3, 50, 0, 0}
                                        : decltype(weight.strides){50, 3, 0, 0};
            linear(input.view({2, k_dim}), weight, {}, {}, output.view({2, n}));
            for (int64_t r = 0; r < 2; ++r)
                for (int64_t f = 0; f < n; ++f) {
                    double sum = 0.0, bound = 0.0;
                    for (int64_t k = 0; k < k_dim; ++k) {
                        const double product = input[r * k_dim + k] * weights[3 * (f + k)];
                        sum += product;
                        bound += std::abs(product) * 16 * kEps;
                    }
                    expect_close(output[r * n + f], sum, bound, kF32, "stride 3");
                }
        }
}

void test_linear_is_grouped_gemm_of_one_group() {
    Random random(11);
    for (const DType dtype : {kF32, kBf16})
        for (const int64_t n : {1, 31, 65})
            for (const int64_t rows : {0, 1, 7, 13}) {
                const int64_t k_dim = 67;
                Array input = random.array(dtype, rows * k_dim);
                Array weight = random.array(dtype, n * k_dim), bias = random.array(kF32, n);
                Array offsets = int_array(DType::kInt64, {0, rows});
                Array wanted(dtype, rows * n), plain(dtype, rows * n), packed(dtype, rows * n);
                grouped_gemm(input.view({rows, k_dim}), weight.view({1, n, k_dim}),
                             bias.view({1, n}), offsets.view({2}), {}, 1, {},
                             wanted.view({rows, n}));
                linear(input.view({rows, k_dim}), weight.view({n, k_dim}), bias.view({n}), {},
                       plain.view({rows, n}));
                PackedWeights packed_weight(dtype, 1, n, k_dim, false);
                packed_weight.pack(0, weight.view({n, k_dim}));
                linear(input.view({rows, k_dim}), packed_weight, bias.view({n}), {},
                       packed.view({rows, n}));
                expect(plain.bytes() == wanted.bytes(), "plain");
                expect(packed.bytes() == wanted.bytes(), "packed");
            }
}

void test_gemm_writes_rows_to_addresses() {
    constexpr int64_t kRows = 40, kN = 72, kK = 24, kGroups = 3;
    for (const DType dtype : {kF32, kBf16})
        for (const bool is_packed : {false, true})
            for (const std::vector<int64_t>& offsets :
                 {std::vector<int64_t>{0, 3, 3, 40}, std::vector<int64_t>{2, 2, 9, 10}}) {
                Random random(8);
                Array input = random.array(dtype, kRows * kK);
                Array weights = random.array(dtype, kGroups * kN * kK);
                Array bias = random.array(kF32, kGroups * kN);
                Array ends(DType::kInt64, kGroups + 1);
                for (size_t g = 0; g <= kGroups; ++g)
                    ends.set(static_cast<int64_t>(g), static_cast<double>(offsets[g]));
                PackedWeights packed(dtype, kGroups, kN, kK, false);
                for (int64_t g = 0; g < kGroups; ++g) {
                    char* matrix = static_cast<char*>(weights.data()) +
                                   static_cast<size_t>(g * kN * kK) * size_of(dtype);
                    packed.pack(g, TensorView(matrix, dtype, {kN, kK}));
                }
                const GroupedGemmWeights w =
                    is_packed ? GroupedGemmWeights(packed)
                              : GroupedGemmWeights(weights.view({kGroups, kN, kK}));
                Array wanted(dtype, kRows * kN), got(dtype, kRows * kN);
                wanted.fill(9.0);
                got.fill(9.0);
                grouped_gemm(input.view({kRows, kK}), w, bias.view({kGroups, kN}),
                             ends.view({kGroups + 1}), {}, 1, {}, wanted.view({kRows, kN}));
                // Row r goes to row 39 - r.
                Array addresses(DType::kInt64, kRows);
                const auto row_bytes = kN * static_cast<int64_t>(size_of(dtype));
                for (int64_t r = 0; r < kRows; ++r)
                    static_cast<int64_t*>(addresses.data())[r] =
                        static_cast<int64_t>(reinterpret_cast<intptr_t>(got.data())) +
                        (kRows - 1 - r) * row_bytes;
                grouped_gemm_to_rows(input.view({kRows, kK}), w, bias.view({kGroups, kN}),
                                     ends.view({kGroups + 1}), dtype, addresses.view({kRows}));
                for (int64_t r = 0; r < kRows; ++r)
                    for (int64_t c = 0; c < kN; ++c)
                        expect(got[(kRows - 1 - r) * kN + c] == wanted[r * kN + c],
                               concat("row ", r, " column ", c));
            }
    Array input(kF32, 8), weights(kF32, 8), ends = int_array(DType::kInt64, {0, 3});
    Array addresses(DType::kInt64, 2);
    const auto call = [&](const TensorView& rows, int64_t expected) {
        grouped_gemm_to_rows(input.view({4, 2}), weights.view({1, 4, 2}), {}, ends.view({2}), kF32,
                             rows, {}, {}, Settled::kNothing, expected);
    };
    expect_invalid([&] { call(addresses.view({2}), 0); },
                   "grouped_gemm_to_rows: expert_offsets must end within the 2 rows of output");
    expect_invalid([&] { call(addresses.view({2, 1}), 0); }, "row_addresses must have");
    expect_invalid([&] { call(input.view({4}), 0); }, "row_addresses must be int64");
    ends.set(1, 2);
    expect_invalid([&] { call(addresses.view({2}), -1); }, "expected_rows must be >= 0, got -1");
}

}  // namespace

void add_grouped_gemm_tests(std::vector<Test>& tests) {
    tests.insert(
        tests.end(),
        {{"gemm_matches_float64_at_odd_sizes", test_gemm_matches_float64_at_odd_sizes},
         {"gemm_matches_float64_around_the_edges_of_tiles",
          test_gemm_matches_float64_around_the_edges_of_tiles},
         {"gemm_cuts_long_groups_and_long_k", test_gemm_cuts_long_groups_and_long_k},
         {"gemm_of_no_rows_writes_nothing", test_gemm_of_no_rows_writes_nothing},
         {"gemm_reads_any_stride_of_a_dimension_of_one",
          test_gemm_reads_any_stride_of_a_dimension_of_one},
         {"gemm_writes_rows_to_addresses", test_gemm_writes_rows_to_addresses},
         {"linear_is_grouped_gemm_of_one_group", test_linear_is_grouped_gemm_of_one_group}});
}

}  // namespace moecore::test
