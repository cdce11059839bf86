#include "moecore/paged_attention.hpp"

#include <algorithm>
#include <functional>
#include <limits>

#include "moecore/threads.hpp"
#include "moecore/write_kv_cache.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

struct Shape {
    DType dtype;
    int64_t num_heads, num_kv_heads, head_dim;
};

/// One sequence's rows and its cache, which holds NaN at first.
struct Sequence {
    Sequence(const Shape& shape, int64_t length, uint32_t seed)
        : shape(shape), length(length), num_blocks((length + kKvBlockSize - 1) / kKvBlockSize) {
        Random random(seed);
        query = random.array(shape.dtype, length * shape.num_heads * shape.head_dim);
        key = random.array(shape.dtype, length * shape.num_kv_heads * shape.head_dim);
        value = random.array(shape.dtype, length * shape.num_kv_heads * shape.head_dim);
        output = Array(shape.dtype, query.size());
        const int64_t block = shape.num_kv_heads * kKvBlockSize * shape.head_dim;
        key_cache = value_cache = Array(shape.dtype, num_blocks * block);
        std::memset(key_cache.data(), 0xff, key_cache.bytes().size());
        std::memset(value_cache.data(), 0xff, value_cache.bytes().size());
        table = Array(DType::kInt32, num_blocks);
        for (int64_t b = 0; b < num_blocks; ++b)  // last block first
            table.set(b, static_cast<double>(num_blocks - 1 - b));
    }

    TensorView rows(Array& array, int64_t heads, int64_t begin, int64_t count) {
        TensorView view = array.view({count, heads, shape.head_dim});
        view.data = static_cast<char*>(view.data) +
                    begin * heads * shape.head_dim * static_cast<int64_t>(size_of(shape.dtype));
        return view;
    }

    /// Writes and attends `count` more tokens.
    void step(int64_t begin, int64_t count) {
        const int64_t elements = kKvBlockSize * shape.head_dim;
        const KvCache cache{key_cache.view({shape.num_kv_heads, num_blocks, elements}),
                            value_cache.view({shape.num_kv_heads, num_blocks, elements})};
        Array offsets = int_array(DType::kInt32, {0, count});
        Array lens = int_array(DType::kInt32, {begin + count});
        const SequenceBatch batch{offsets.view({2}), lens.view({1}), table.view({1, num_blocks})};
        write_kv_cache(rows(key, shape.num_kv_heads, begin, count),
                       rows(value, shape.num_kv_heads, begin, count), cache, batch);
        paged_attention(rows(query, shape.num_heads, begin, count), cache, batch, 0.25f,
                        rows(output, shape.num_heads, begin, count));
    }

    Shape shape;
    int64_t length, num_blocks;
    Array query, key, value, output, key_cache, value_cache, table;
};

void check_row(const Sequence& s, int64_t t, int64_t h) {
    const int64_t kv_head = h / (s.shape.num_heads / s.shape.num_kv_heads);
    const auto at = [&](int64_t token, int64_t head, int64_t heads, int64_t d) {
        return (token * heads + head) * s.shape.head_dim + d;
    };
    std::vector<double> weights;
    double largest = -std::numeric_limits<double>::infinity(), magnitude = 0, sum = 0;
    for (int64_t i = 0; i <= t; ++i) {
        double score = 0, absolute = 0;
        for (int64_t d = 0; d < s.shape.head_dim; ++d) {
            const double term = s.query[at(t, h, s.shape.num_heads, d)] *
                                s.key[at(i, kv_head, s.shape.num_kv_heads, d)] / 4;
            score += term;
            absolute += std::abs(term);
        }
        weights.push_back(score);
        largest = std::max(largest, score);
        magnitude = std::max(magnitude, absolute);
    }
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    // A score is off by its roundings; weights err above and below the division, and above it by
    // their rounding to the dtype.
    const double score_error = static_cast<double>(4 * s.shape.head_dim + 16) * kEps * magnitude;
    const double relative = 2 * (2 * score_error + static_cast<double>(2 * t + 32) * kEps) +
                            (s.shape.dtype == kBf16 ? 0x1p-8 : 0);
    for (int64_t d = 0; d < s.shape.head_dim; ++d) {
        double wanted = 0, spread = 0;
        for (int64_t i = 0; i <= t; ++i) {
            const double v = s.value[at(i, kv_head, s.shape.num_kv_heads, d)];
            wanted += weights[static_cast<size_t>(i)] / sum * v;
            spread += weights[static_cast<size_t>(i)] / sum * std::abs(v);
        }
        expect_close(s.output[at(t, h, s.shape.num_heads, d)], wanted, relative * spread,
                     s.shape.dtype, concat("token ", t, " head ", h, " element ", d));
    }
}

void test_paged_attention_is_right_however_a_prompt_is_cut() {
    constexpr int64_t kLength = 140;
    for (const DType dtype : {kF32, kBf16})
        for (const Shape& shape : {Shape{dtype, 4, 2, 64}, Shape{dtype, 3, 1, 80},
                                   Shape{dtype, 7, 7, 2}, Shape{dtype, 1, 1, 256}}) {
            set_num_threads(2);
            Sequence whole(shape, kLength, 1), cut(shape, kLength, 1), single(shape, kLength, 1);
            whole.step(0, kLength);
            for (const int64_t t : {0, 1, 62, 63, 64, 127, 128, 139})
                for (int64_t h = 0; h < shape.num_heads; ++h) check_row(whole, t, h);
            for (int64_t t = 0, n = 1; t < kLength; t += n) {
                n = std::min<int64_t>(t % 37 + 1, kLength - t);
                cut.step(t, n);
            }
            set_num_threads(1);
            for (int64_t t = 0; t < kLength; ++t) single.step(t, 1);
            expect(cut.output.bytes() == whole.output.bytes(), "chunks change bits");
            expect(single.output.bytes() == whole.output.bytes(), "single tokens change bits");
            expect(single.key_cache.bytes() == whole.key_cache.bytes(), "the same keys");
            expect(single.value_cache.bytes() == whole.value_cache.bytes(), "the same values");
        }
}

void test_paged_attention_never_sees_later_values() {
    for (const DType dtype : {kF32, kBf16})
        for (const int64_t bad : {1, 8, 63, 64}) {
            const Shape shape{dtype, 4, 2, 20};
            Sequence good(shape, 70, 2), poisoned(shape, 70, 2);
            const int64_t row = shape.num_kv_heads * shape.head_dim;
            for (int64_t i = 0; i < row; ++i)
                poisoned.value.set(bad * row + i, std::numeric_limits<double>::infinity());
            good.step(0, 70);
            poisoned.step(0, 70);
            for (int64_t i = 0; i < bad * shape.num_heads * shape.head_dim; ++i)
                expect(good.output[i] == poisoned.output[i], concat("element ", i, " sees ", bad));
        }
}

void test_paged_attention_names_the_bad_argument() {
    // Two tokens at 68 and 69 of one sequence, Hq 4, Hk 2, D 4, two blocks.
    Array query(kF32, 1024), key(kF32, 1024), value(kF32, 1024), output(kF32, 1024);
    Array key_cache(kF32, 1024), value_cache(kF32, 1024);
    Array offsets = int_array(DType::kInt32, {0, 2}), lens = int_array(DType::kInt32, {70});
    Array tables = int_array(DType::kInt32, {1, 0});
    struct Arguments {
        TensorView query, key, value, output;
        KvCache cache;
        SequenceBatch batch;
        float scale = 1.0f;
    };
    const Arguments good{query.view({2, 4, 4}),
                         key.view({2, 2, 4}),
                         value.view({2, 2, 4}),
                         output.view({2, 4, 4}),
                         {key_cache.view({2, 2, 256}), value_cache.view({2, 2, 256})},
                         {offsets.view({2}), lens.view({1}), tables.view({1, 2})}};
    const auto attend = [](const Arguments& a) {
        paged_attention(a.query, a.cache, a.batch, a.scale, a.output);
    };
    const auto write = [](const Arguments& a) { write_kv_cache(a.key, a.value, a.cache, a.batch); };
    write(good);
    attend(good);
    const auto bad = [&](const std::function<void(Arguments&)>& change, const char* text,
                         bool attends = true, bool writes = true,
                         std::source_location where = std::source_location::current()) {
        Arguments a = good;
        change(a);
        if (attends) expect_invalid([&] { attend(a); }, concat("paged_attention: ", text), where);
        if (writes) expect_invalid([&] { write(a); }, concat("write_kv_cache: ", text), where);
    };
    bad([](auto& a) { a.cache.key = {}; }, "key_cache must");
    bad([](auto& a) { a.cache.key.dtype = DType::kInt32; }, "key_cache must");
    bad([](auto& a) { a.cache.key.strides[0] = -512; }, "key_cache must");
    bad([](auto& a) { a.cache.key.shape[0] = 0; }, "key_cache must have at least one head");
    bad([](auto& a) { a.cache.value.shape[0] = 1; }, "value_cache must");
    bad([](auto& a) { a.cache.value.device = kOtherDevice; }, "value_cache must");
    bad([](auto& a) { a.cache.value.data = a.cache.key.data; }, "key_cache must not overlap");
    bad([](auto& a) { a.batch.query_offsets.shape[0] = 3; }, "query_offsets must");
    bad([](auto& a) { a.batch.context_lens.dtype = DType::kInt64; }, "context_lens must");
    bad([](auto& a) { a.batch.block_tables.rank = 1; }, "block_tables must");
    bad([](auto& a) { a.batch.block_tables.shape[1] = 1; }, "context_lens must");
    bad([](auto& a) { a.batch.block_tables.device = kOtherDevice; }, "block_tables must");
    for (const int64_t block : {-1, 2}) {
        Array wrong = int_array(DType::kInt32, {1, block});
        bad([&](auto& a) { a.batch.block_tables = wrong.view({1, 2}); }, "block_tables must");
    }
    for (const int64_t length : {1, 129}) {
        Array wrong = int_array(DType::kInt32, {length});
        bad([&](auto& a) { a.batch.context_lens = wrong.view({1}); }, "context_lens must");
    }
    for (const auto& [first, last] : {std::pair{1, 2}, std::pair{0, 1}}) {
        Array wrong = int_array(DType::kInt32, {first, last});
        bad([&](auto& a) { a.batch.query_offsets = wrong.view({2}); }, "query_offsets must");
    }
    bad([](auto& a) { a.key.dtype = kBf16; }, "key must", false);
    bad([](auto& a) { a.key.shape[1] = 1; }, "key must", false);
    bad([](auto& a) { a.value.strides[0] = -8; }, "value must", false);
    bad([](auto& a) { a.key.data = a.cache.value.data; }, "value_cache must not overlap key",
        false);
    bad([](auto& a) { a.query.shape[1] = 3; }, "query must", true, false);
    bad([](auto& a) { a.query.dtype = kBf16; }, "query must", true, false);
    bad([](auto& a) { a.scale = 0; }, "scale must", true, false);
    bad([](auto& a) { a.output.shape[2] = 3; }, "output must", true, false);
    bad([](auto& a) { a.output.data = a.query.data; }, "output must not overlap query", true,
        false);
    bad([](auto& a) { a.output.data = a.cache.key.data; }, "output must not overlap key_cache",
        true, false);
    bool unsupported = false;
    try {
        const SequenceBatch& b = good.batch;
        paged_attention(on_other_device(good.query),
                        {on_other_device(good.cache.key), on_other_device(good.cache.value)},
                        {on_other_device(b.query_offsets), on_other_device(b.context_lens),
                         on_other_device(b.block_tables)},
                        1.0f, on_other_device(good.output));
    } catch (const UnsupportedError& error) {
        unsupported = std::string(error.what()).find("on CUDA the cache must be bfloat16") !=
                      std::string::npos;
    }
    expect(unsupported, "a CUDA cache of float32 must be refused");
}

}  // namespace

void add_paged_attention_tests(std::vector<Test>& tests) {
    tests.insert(
        tests.end(),
        {{"paged_attention_is_right_however_a_prompt_is_cut",
          test_paged_attention_is_right_however_a_prompt_is_cut},
         {"paged_attention_never_sees_later_values", test_paged_attention_never_sees_later_values},
         {"paged_attention_names_the_bad_argument", test_paged_attention_names_the_bad_argument}});
}

}  // namespace moecore::test
