#include "moecore/gather_rows.hpp"
#include "moecore/locate_results.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

void rows_are_gathered_and_others_left() {
    for (const DType dtype : {kF32, kBf16})
        for (const int64_t width : {1, 7, 64}) {
            Random random(5);
            constexpr int64_t kRows = 6, kStride = 70;
            Array input = random.array(dtype, strided_size(kRows, width, kStride));
            Array index = int_array(DType::kInt32, {5, -1, 0, 0, 3});
            Array output(dtype, 5 * width);
            output.fill(9.0);
            gather_rows(input.rows(kRows, width, kStride), index.view({5}),
                        output.view({5, width}));
            for (int64_t i = 0; i < 5; ++i)
                for (int64_t c = 0; c < width; ++c) {
                    const auto row = static_cast<int64_t>(index[i]);
                    const double wanted = row < 0 ? 9.0 : input[row * kStride + c];
                    expect(output[i * width + c] == wanted, concat("row ", i, " column ", c));
                }
        }
}

/// Where the rows of `view` are, last first.
Array addresses_of(const TensorView& view) {
    Array result(DType::kInt64, view.shape[0]);
    const auto row_bytes = static_cast<size_t>(view.strides[0]) * size_of(view.dtype);
    for (int64_t i = 0; i < view.shape[0]; ++i) {
        const char* row = static_cast<const char*>(view.data) +
                          static_cast<size_t>(view.shape[0] - 1 - i) * row_bytes;
        static_cast<int64_t*>(result.data())[i] =
            static_cast<int64_t>(reinterpret_cast<intptr_t>(row));
    }
    return result;
}

void rows_are_scattered_to_addresses() {
    for (const DType dtype : {kF32, kBf16})
        for (const int64_t width : {1, 7, 64})
            for (const bool with_index : {true, false}) {
                Random random(6);
                constexpr int64_t kRows = 6, kStride = 70, kCount = 5;
                Array input = random.array(dtype, strided_size(kRows, width, kStride));
                Array index = int_array(DType::kInt32, {5, -1, 0, 0, 3});
                Array output(dtype, kCount * width);
                output.fill(9.0);
                Array addresses = addresses_of(output.view({kCount, width}));
                scatter_rows(input.rows(kRows, width, kStride),
                             with_index ? index.view({kCount}) : TensorView(),
                             addresses.view({kCount}));
                for (int64_t i = 0; i < kCount; ++i)
                    for (int64_t c = 0; c < width; ++c) {
                        const int64_t row = with_index ? static_cast<int64_t>(index[i]) : i;
                        const double wanted = row < 0 ? 9.0 : input[row * kStride + c];
                        expect(output[(kCount - 1 - i) * width + c] == wanted,
                               concat("row ", i, " column ", c));
                    }
            }
    Array input(kF32, 12), index = int_array(DType::kInt32, {0, 3});
    Array few(DType::kInt64, 2), many(DType::kInt64, 4);
    expect_invalid([&] { scatter_rows(input.view({3, 4}), index.view({2}), few.view({2})); },
                   "scatter_rows: index must be in [-1, 3), got 3 at 1");
    expect_invalid([&] { scatter_rows(input.view({3, 4}), index.view({2}), many.view({4})); },
                   "index must have shape [4]");
    expect_invalid([&] { scatter_rows(input.view({3, 4}), {}, many.view({4})); },
                   "addresses must be at most the 3 rows of input without index, got 4");
    expect_invalid([&] { scatter_rows(input.view({3, 4}), {}, index.view({2})); },
                   "addresses must be int64");
}

void gather_rows_checks_its_arguments() {
    Array input(kF32, 12), output(kF32, 8), wrong(kBf16, 8);
    Array index = int_array(DType::kInt32, {0, 3});
    const auto call = [&](TensorView i, TensorView o) { gather_rows(input.view({3, 4}), i, o); };
    expect_invalid([&] { call(index.view({2}), output.view({2, 4})); },
                   "gather_rows: index must be in [-1, 3), got 3 at 1");
    expect_invalid([&] { call(index.view({2}), output.view({1, 4})); }, "output must have");
    expect_invalid([&] { call(index.view({2}), wrong.view({2, 4})); }, "output must");
    expect_invalid([&] { call(index.view({2}), input.view({2, 4})); }, "output must not overlap");
    expect_invalid([&] { call(on_other_device(index.view({2})), output.view({2, 4})); }, "index");
}

void results_are_located_by_owner() {
    Array ids = int_array(DType::kInt32, {0, 2, 3, 4, -1, 5});
    Array first = int_array(DType::kInt32, {0, 3, 3, 5});  // rank 1 owns nothing
    Array output(DType::kInt32, 6);
    locate_results(ids.view({3, 2}), first.view({4}), output.view({6}));
    const std::vector<double> wanted{0, 1, 14, 15, -1, -1};
    for (int64_t i = 0; i < 6; ++i)
        expect(output[i] == wanted[static_cast<size_t>(i)], concat("slot ", i, ": ", output[i]));
    expect_invalid([&] { locate_results(ids.view({3, 2}), first.view({1}), output.view({6})); },
                   "first_experts must have at least 2 entries, got 1");
}

}  // namespace

void add_gather_rows_tests(std::vector<Test>& tests) {
    tests.push_back({"rows are gathered", rows_are_gathered_and_others_left});
    tests.push_back({"rows are scattered", rows_are_scattered_to_addresses});
    tests.push_back({"gather_rows arguments", gather_rows_checks_its_arguments});
    tests.push_back({"results are located by owner", results_are_located_by_owner});
}

}  // namespace moecore::test
