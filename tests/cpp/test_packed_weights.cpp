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
         {"buffer_of_3_mb_is_aligned_and_writable", test_buffer_of_3_mb_is_aligned_and_writable},
         {"workspace_hands_out_exactly_its_bytes", test_workspace_hands_out_exactly_its_bytes},
         {"thread_counts", test_thread_counts}});
}

}  // namespace moecore::test
