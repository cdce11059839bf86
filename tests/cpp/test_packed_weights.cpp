#include <functional>

#include "moecore/buffer.hpp"
#include "moecore/packed_weights.hpp"
#include "moecore/threads.hpp"
#include "moecore/workspace.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

void test_packed_weights_name_the_bad_argument() {
    const auto bad_size = [](DType dtype, int64_t groups, int64_t n, int64_t k, bool gated,
                             const char* text) {
        expect_invalid([&] { PackedWeights(dtype, groups, n, k, gated); },
                       std::string("PackedWeights: ") + text);
    };
    bad_size(DType::kInt32, 1, 1, 1, false, "dtype must");
    bad_size(kF32, 0, 1, 1, false, "num_groups must");
    bad_size(kF32, 1, 0, 1, false, "n must");
    bad_size(kF32, 1, 3, 1, true, "n must");
    bad_size(kF32, 1, 1, 0, false, "k_dim must");
    bad_size(kF32, 1, int64_t{1} << 32, int64_t{1} << 32, false, "num_groups * n * k_dim must");
    bad_size(kF32, int64_t{1} << 40, 64, 1 << 20, false, "num_groups * n * k_dim must");
    bool unsupported = false;
    try {
        PackedWeights(kF32, 1, 1, 1, false, kOtherDevice);
    } catch (const UnsupportedError&) {
        unsupported = true;
    }
    expect(unsupported, "packed weights on a GPU must be unsupported");

    Array data(kF32, 24), other(kBf16, 24);
    PackedWeights plain(kF32, 2, 6, 4, false), gated(kF32, 2, 6, 4, true);
    plain.pack(1, data.view({6, 4}));
    gated.pack_gated(1, data.view({3, 4}), data.view({3, 4}));
    TensorView strided = data.view({3, 4});
    strided.strides = {1, 3, 0, 0};
    const TensorView half = data.view({3, 4});
    const std::pair<std::function<void()>, const char*> calls[] = {
        {[&] { plain.pack(2, data.view({6, 4})); }, "group must"},
        {[&] { plain.pack(-1, data.view({6, 4})); }, "group must"},
        {[&] { plain.pack(0, data.view({4, 6})); }, "weights must"},
        {[&] { plain.pack(0, {}); }, "weights must"},
        {[&] { plain.pack(0, other.view({6, 4})); }, "weights must"},
        {[&] { plain.pack(0, on_other_device(data.view({6, 4}))); }, "weights must"},
        {[&] { plain.pack_gated(0, half, half); }, "pack_gated needs"},
        {[&] { gated.pack(0, data.view({6, 4})); }, "pack needs"},
        {[&] { gated.pack_gated(0, data.view({6, 4}), half); }, "gate must"},
        {[&] { gated.pack_gated(0, other.view({3, 4}), half); }, "gate must be float32"},
        {[&] { gated.pack_gated(0, on_other_device(half), half); }, "gate must be on cpu"},
        {[&] { gated.pack_gated(0, half, data.view({6, 4})); }, "up must"},
        {[&] { gated.pack_gated(0, half, other.view({3, 4})); }, "up must"},
        {[&] { gated.pack_gated(0, half, on_other_device(half)); }, "up must"},
        {[&] { gated.pack_gated(0, half, strided); }, "gate and up must"},
        {[&] { gated.pack_gated(2, half, half); }, "group must"},
    };
    for (const auto& [call, text] : calls)
        expect_invalid(call, std::string("PackedWeights: ") + text);
}

/// Where element (row, k) of a matrix lies: panels of 64 features, K outermost, two K of bfloat16
/// side by side. A gated panel holds 32 gates, then their ups.
int64_t place(int64_t n, int64_t k_dim, bool gated, DType dtype, int64_t row, int64_t k) {
    const int64_t pair = dtype == kBf16 ? 2 : 1, width = n / 2;
    const int64_t panel = gated ? row % width / 32 : row / 64;
    const int64_t column = gated ? row % width % 32 + (row >= width ? 32 : 0) : row % 64;
    const int64_t padded_k = (k_dim + pair - 1) / pair * pair;
    return (panel * padded_k + k / pair * pair) * 64 + column * pair + k % pair;
}

/// Packs one matrix that is stored with the given strides (gates before ups, or in turns), in an
/// allocation without a byte to spare, and looks at every element and at the padding.
void check_packing(DType dtype, int64_t n, int64_t k_dim, bool gated, bool in_turns,
                   bool n_contiguous, int64_t gap, bool backwards) {
    Random random(static_cast<uint32_t>(n * 100 + k_dim));
    int64_t row_stride = n_contiguous ? 1 : k_dim + gap;
    int64_t k_stride = n_contiguous ? n + gap : 1;
    Array source = random.array(dtype, (n - 1) * row_stride + (k_dim - 1) * k_stride + 1);
    int64_t origin = 0;
    if (backwards) {  // the slow dimension runs down in memory
        int64_t& slow = n_contiguous ? k_stride : row_stride;
        origin = ((n_contiguous ? k_dim : n) - 1) * slow;
        slow = -slow;
    }
    const auto part = [&](int64_t first, int64_t rows, int64_t step) {
        TensorView view(static_cast<char*>(source.data()) +
                            (origin + first * row_stride) * static_cast<int64_t>(size_of(dtype)),
                        dtype, {rows, k_dim});
        view.strides = {row_stride * step, k_stride, 0, 0};
        return view;
    };
    PackedWeights packed(dtype, 2, n, k_dim, gated);
    std::memset(const_cast<void*>(packed.data()), 0x7f, packed.size_bytes());
    if (!gated)
        packed.pack(1, part(0, n, 1));
    else if (in_turns)
        packed.pack_gated(1, part(0, n / 2, 2), part(1, n / 2, 2));
    else
        packed.pack_gated(1, part(0, n / 2, 1), part(n / 2, n / 2, 1));

    Array wanted(dtype, packed.group_stride()), got(dtype, packed.group_stride());
    for (int64_t row = 0; row < n; ++row)
        for (int64_t k = 0; k < k_dim; ++k) {
            const int64_t feature = in_turns ? row / 2 + row % 2 * (n / 2) : row;
            wanted.set(place(n, k_dim, gated, dtype, feature, k),
                       source[origin + row * row_stride + k * k_stride]);
        }
    std::memcpy(got.data(),
                static_cast<const char*>(packed.data()) +
                    static_cast<size_t>(packed.group_stride()) * size_of(dtype),
                got.bytes().size());
    expect(got.bytes() == wanted.bytes(),
           concat(name_of(dtype), " N ", n, " K ", k_dim, " gated ", gated, " in turns ", in_turns,
                  " N contiguous ", n_contiguous, " gap ", gap, " backwards ", backwards));
}

void test_packed_weights_have_the_same_order_from_every_layout() {
    for (const DType dtype : {kF32, kBf16})
        for (const int64_t n : {2, 30, 64, 98, 192})
            for (const int64_t k_dim : {1, 2, 31, 33, 64, 131})
                for (const int gate : {0, 1, 2})
                    for (const bool n_contiguous : {false, true})
                        for (const int64_t gap : {0, 5})
                            for (const bool backwards : {false, true})
                                check_packing(dtype, n, k_dim, gate > 0, gate > 1, n_contiguous,
                                              gap, backwards);
}

void test_buffer_of_3_mb_is_aligned_and_writable() {
    for (const size_t bytes : {size_t{1}, size_t{257}, (size_t{2} << 20) - 1, size_t{2} << 20,
                               size_t{3} << 20, size_t{3'000'000}}) {
        Buffer buffer({}, bytes);
        std::memset(buffer.data(), 1, bytes);
        expect(reinterpret_cast<uintptr_t>(buffer.data()) % 256 == 0, "256-byte alignment");
        if (bytes >= size_t{2} << 20)
            expect(reinterpret_cast<uintptr_t>(buffer.data()) % (size_t{2} << 20) == 0,
                   "2 MiB alignment");
        void* data = buffer.data();
        Buffer moved(std::move(buffer));
        expect(moved.data() == data && moved.size_bytes() == bytes, "a move keeps the memory");
        Buffer assigned;
        assigned = std::move(moved);
        expect(assigned.data() == data, "so does a move assignment");
    }
    expect(Buffer({}, 0).data() == nullptr, "no bytes, no memory");
}

void test_workspace_hands_out_exactly_its_bytes() {
    Workspace workspace({}, 512);
    std::memset(workspace.take(kF32, {64}).data, 1, 256);
    std::memset(workspace.take(DType::kInt64, {4, 8}).data, 2, 256);
    expect_invalid([&] { workspace.take(kBf16, {1}); }, "Workspace: size must");
    expect(workspace.take(kBf16, {0, 3}).num_elements() == 0, "an empty view always fits");
    workspace.reset();
    expect_invalid([&] { workspace.take(kF32, {129}); }, "Workspace: size must");
    workspace.grow(768);
    std::memset(workspace.take(kF32, {129}).data, 3, 516);
    workspace.grow(16);
    expect(workspace.size_bytes() == 768, "grow never shrinks");
}

void test_thread_counts() {
    set_num_threads(2);
    expect(num_threads() == 2, "two threads");
    set_num_threads(0);
    expect(num_threads() >= 1, "0 follows OpenMP");
    expect_invalid([] { set_num_threads(-1); }, "num_threads must");
}

}  // namespace

void add_packed_weights_tests(std::vector<Test>& tests) {
    tests.insert(
        tests.end(),
        {{"packed_weights_name_the_bad_argument", test_packed_weights_name_the_bad_argument},
         {"packed_weights_have_the_same_order_from_every_layout",
          test_packed_weights_have_the_same_order_from_every_layout},
         {"buffer_of_3_mb_is_aligned_and_writable", test_buffer_of_3_mb_is_aligned_and_writable},
         {"workspace_hands_out_exactly_its_bytes", test_workspace_hands_out_exactly_its_bytes},
         {"thread_counts", test_thread_counts}});
}

}  // namespace moecore::test
