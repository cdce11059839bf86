#include "moecore/embedding.hpp"

#include "test_main.hpp"

namespace moecore::test {
namespace {

void test_embedding_copies_rows_of_plain_and_packed_weights() {
    for (const DType dtype : {kF32, kBf16})
        for (const int64_t num_rows : {1, 63, 130})
            for (const int64_t width : {1, 2, 33, 100}) {
                Random random(static_cast<uint32_t>(num_rows + width));
                Array weight = random.array(dtype, num_rows * width);
                PackedWeights packed(dtype, 1, num_rows, width, false);
                packed.pack(0, weight.view({num_rows, width}));
                std::vector<int64_t> rows{num_rows - 1, 0, num_rows / 2, num_rows - 1};
                for (const DType ids_dtype : {DType::kInt32, DType::kInt64}) {
                    Array ids = int_array(ids_dtype, rows);
                    Array plain(dtype, 4 * width), unpacked(dtype, 4 * width);
                    embedding(ids.view({4}), weight.view({num_rows, width}),
                              plain.view({4, width}));
                    embedding(ids.view({4}), packed, unpacked.view({4, width}));
                    for (int64_t i = 0; i < 4 * width; ++i)
                        expect(plain[i] ==
                                   weight[rows[static_cast<size_t>(i / width)] * width + i % width],
                               concat("element ", i, " of ", num_rows, " x ", width));
                    expect(plain.bytes() == unpacked.bytes(), "packed rows are the plain ones");
                }
            }
}

void test_embedding_names_the_bad_argument() {
    Array weight(kF32, 12), output(kF32, 12);
    Array ids = int_array(DType::kInt32, {0, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0});
    const TensorView ids_view = ids.view({2}), weight_view = weight.view({4, 3}),
                     output_view = output.view({2, 3});
    const auto bad = [&](TensorView i, TensorView w, TensorView o, const char* text,
                         std::source_location where = std::source_location::current()) {
        expect_invalid([&] { embedding(i, w, o); }, std::string("embedding: ") + text, where);
    };
    embedding(ids_view, weight_view, output_view);
    bad({}, weight_view, output_view, "ids must");
    bad(weight_view, weight_view, output_view, "ids must");
    bad(on_other_device(ids_view), weight_view, output_view, "ids must");
    bad(ids_view, {}, output_view, "weight must");
    bad(ids_view, ids_view, output_view, "weight must");
    bad(ids_view, weight_view, {}, "output must");
    bad(ids_view, weight_view, weight_view, "output must");
    bad(ids_view, weight_view, on_other_device(output_view), "output must");
    TensorView over = output_view;
    over.data = weight_view.data;
    bad(ids_view, weight_view, over, "output must not overlap weight");
    over.data = ids_view.data;
    bad(ids_view, weight_view, over, "output must not overlap ids");
    for (const int64_t id : {-1, 4}) {
        Array wrong = int_array(DType::kInt64, {0, id});
        bad(wrong.view({2}), weight_view, output_view, "ids must be in [0, 4)");
    }
    for (const bool gated : {false, true}) {
        const PackedWeights experts(kF32, gated ? 1 : 2, 4, 3, gated);
        expect_invalid([&] { embedding(ids_view, experts, output_view); },
                       "embedding: weight must hold one group");
    }
}

}  // namespace

void add_embedding_tests(std::vector<Test>& tests) {
    tests.insert(tests.end(),
                 {{"embedding_copies_rows_of_plain_and_packed_weights",
                   test_embedding_copies_rows_of_plain_and_packed_weights},
                  {"embedding_names_the_bad_argument", test_embedding_names_the_bad_argument}});
}

}  // namespace moecore::test
