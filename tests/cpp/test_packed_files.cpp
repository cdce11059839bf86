#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <iterator>
#include <utility>

#include "moecore/packed_weights.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

/// A file in memory that holds `before` bytes of something else, then an array's bytes.
class File {
public:
    explicit File(const Array& array, int64_t before = 0) : descriptor_(memfd_create("test", 0)) {
        expect(descriptor_ >= 0, "memfd_create");
        const auto size = static_cast<int64_t>(array.bytes().size());
        expect(pwrite(descriptor_, array.bytes().data(), array.bytes().size(), before) == size,
               "pwrite");
    }
    ~File() { close(descriptor_); }
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    int descriptor() const { return descriptor_; }

private:
    int descriptor_;
};

struct Sizes {
    DType dtype;
    int64_t n, k_dim;
    bool gated;
};

void pack_files(PackedWeights& weights, int64_t group, std::vector<FileMatrix> matrices,
                int num_threads = 1) {
    const FilePacking packing{&weights, group, std::move(matrices)};
    PackedWeights::pack_files({&packing, 1}, num_threads);
}

/// Packs one matrix whose rows up to `cut` lie in one file and the others in another, the first at
/// an odd offset; every byte must be as pack() leaves it, padding and the other group too.
void check_files(const Sizes& sizes, int64_t cut, int num_threads = 1) {
    const auto& [dtype, n, k_dim, gated] = sizes;
    Random random(static_cast<uint32_t>(n * 100 + k_dim));
    const int64_t element = static_cast<int64_t>(size_of(dtype)), after = n - cut;
    Array upper = random.array(dtype, cut * k_dim), lower = random.array(dtype, after * k_dim);
    Array whole(dtype, n * k_dim);
    for (int64_t i = 0; i < n * k_dim; ++i)
        whole.set(i, i < cut * k_dim ? upper[i] : lower[i - cut * k_dim]);

    PackedWeights wanted(dtype, 2, n, k_dim, gated), got(dtype, 2, n, k_dim, gated);
    for (PackedWeights* weights : {&wanted, &got})
        std::memset(const_cast<void*>(weights->data()), 0x7f, weights->size_bytes());
    if (gated) {
        TensorView gate = whole.view({n / 2, k_dim}), up = gate;
        up.data = static_cast<char*>(up.data) + n / 2 * k_dim * element;
        wanted.pack_gated(1, gate, up);
    } else {
        wanted.pack(1, whole.view({n, k_dim}));
    }
    const File first(upper, 13), second(lower, 4096);
    std::vector<FileMatrix> matrices = {{first.descriptor(), 13, cut, k_dim}};
    if (after > 0) matrices.push_back({second.descriptor(), 4096, after, k_dim});
    pack_files(got, 1, matrices, num_threads);
    expect(std::memcmp(wanted.data(), got.data(), got.size_bytes()) == 0,
           concat(name_of(dtype), " N ", n, " K ", k_dim, " gated ", gated, " cut ", cut));
}

void test_packed_files_have_the_bytes_of_packed_tensors() {
    for (const DType dtype : {kF32, kBf16})
        for (const bool gated : {false, true}) {
            for (const int64_t n : {2, 30, 64, 98, 192})
                for (const int64_t k_dim : {1, 31, 33, 64, 131, 300})
                    for (const int64_t cut : {int64_t{1}, n / 2, n})
                        check_files({dtype, n, k_dim, gated}, cut);
            // Several pieces of several panels, and of less than one.
            check_files({dtype, 998, 1000, gated}, 499);
            check_files({dtype, 200, 5000, gated}, 77);
        }
}

void test_packed_files_are_shared_by_threads() {
    for (const int threads : {2, 5}) {
        check_files({kBf16, 1400, 1000, true}, 700, threads);
        check_files({kF32, 1400, 1000, false}, 300, threads);
    }
}

void test_many_groups_are_packed_in_one_call() {
    const Sizes all[] = {{kBf16, 998, 1000, true},
                         {kF32, 30, 20, false},
                         {kBf16, 64, 33, false},
                         {kF32, 200, 2000, true}};
    constexpr int64_t kGroups = 3;
    Random random(5);
    const Array data = random.array(kBf16, 2'000'000);
    const File file(data);
    for (const int threads : {1, 2, 5}) {
        std::vector<PackedWeights> wanted, got;
        for (const auto& [dtype, n, k_dim, gated] : all)
            for (std::vector<PackedWeights>* to : {&wanted, &got}) {
                to->emplace_back(dtype, kGroups, n, k_dim, gated);
                std::memset(const_cast<void*>(to->back().data()), 0x7f, to->back().size_bytes());
            }
        std::vector<FilePacking> packings;
        for (const int64_t group : {2, 0})
            for (size_t i = 0; i < std::size(all); ++i) {
                const auto& [dtype, n, k_dim, gated] = all[i];
                const std::vector<FileMatrix> matrices = {{file.descriptor(), 8 * group, 2, k_dim},
                                                          {file.descriptor(), 1000, n - 2, k_dim}};
                pack_files(wanted[i], group, matrices);
                packings.push_back({&got[i], group, matrices});
            }
        PackedWeights::pack_files(packings, threads);
        for (size_t i = 0; i < std::size(all); ++i)
            expect(std::memcmp(wanted[i].data(), got[i].data(), got[i].size_bytes()) == 0,
                   concat("weights ", i, " on ", threads, " threads"));
    }
    PackedWeights::pack_files({}, 2);
}

void test_nothing_is_packed_if_one_group_cannot_be() {
    PackedWeights weights(kF32, 2, 6, 4, false);
    std::memset(const_cast<void*>(weights.data()), 0x7f, weights.size_bytes());
    const Array data(kF32, 24);
    const File file(data);
    const FileMatrix right{file.descriptor(), 0, 6, 4}, wrong{file.descriptor(), 0, 6, 5};
    const FilePacking packings[] = {{&weights, 0, {right}}, {&weights, 1, {wrong}}};
    expect_invalid([&] { PackedWeights::pack_files(packings, 1); },
                   "PackedWeights: matrices must have k_dim 4, got 5");
    const auto* bytes = static_cast<const unsigned char*>(weights.data());
    expect(std::all_of(bytes, bytes + weights.size_bytes(), [](int byte) { return byte == 0x7f; }),
           "the first group is as it was");
}

void test_packed_files_name_the_bad_argument() {
    PackedWeights weights(kF32, 2, 6, 4, false);
    const Array data(kF32, 24);
    const File file(data);
    const int fd = file.descriptor();
    const std::pair<std::vector<FileMatrix>, const char*> calls[] = {
        {{}, "matrices must have 6 rows together, got 0"},
        {{{fd, 0, 5, 4}}, "matrices must have 6 rows together, got 5"},
        {{{fd, 0, 3, 4}, {fd, 0, 4, 4}},
         "matrices must have 6 rows together, got one of 4 after 3"},
        {{{fd, 0, 0, 4}, {fd, 0, 6, 4}}, "matrices must have 6 rows together, got one of 0"},
        {{{fd, 0, INT64_MAX, 4}}, "matrices must have 6 rows together, got one of"},
        {{{fd, 0, 4, 6}}, "matrices must have k_dim 4, got 6"},
        {{{fd, -1, 6, 4}}, "offset must be in [0, 2^62], got -1"},
        {{{fd, INT64_MAX, 6, 4}}, "offset must be in [0, 2^62], got"},
    };
    for (const auto& [matrices, text] : calls)
        expect_invalid([&] { pack_files(weights, 0, matrices); },
                       std::string("PackedWeights: ") + text);
    const FileMatrix right{fd, 0, 6, 4};
    for (const int64_t group : {-1, 2})
        expect_invalid([&] { pack_files(weights, group, {right}); }, "group must");
    expect_invalid([&] { pack_files(weights, 0, {right}, 0); },
                   "PackedWeights: num_threads must be >= 1, got 0");
}

void expect_read_error(const std::function<void()>& call, size_t matrix, int64_t found, int number,
                       const std::string& text) {
    std::string got = "no error";
    try {
        call();
    } catch (const FileReadError& error) {
        got = error.what();
        expect(error.matrix() == matrix, concat("matrix ", error.matrix()));
        expect(error.found() == found, concat("found ", error.found()));
        expect(error.error_number() == number, concat("errno ", error.error_number()));
    }
    expect(got == text, concat("wanted '", text, "', got '", got, "'"));
}

void test_packed_files_say_where_a_file_ended_or_failed() {
    const Array data(kBf16, 1000 * 640);  // several pieces: some begin beyond the end
    const File whole(data), cut(data);
    expect(ftruncate(cut.descriptor(), 100'001) == 0, "ftruncate");
    for (const int threads : {1, 3}) {
        for (const bool gated : {false, true}) {
            PackedWeights weights(kBf16, 1, 2000, 640, gated);
            PackedWeights first(kBf16, 1, 3, 640, false);
            const auto pack = [&](int second, int64_t offset) {
                const int fd = whole.descriptor();
                const FilePacking packings[] = {
                    {&first, 0, {{fd, 0, 1, 640}, {fd, 0, 2, 640}}},
                    {&weights, 0, {{fd, 0, 1000, 640}, {second, offset, 1000, 640}}}};
                PackedWeights::pack_files(packings, threads);
            };
            expect_read_error([&] { pack(cut.descriptor(), 0); }, 3, 100'001, 0,
                              "PackedWeights: the file ended after 100001 bytes of a matrix");
            expect_read_error([&] { pack(cut.descriptor(), 200'000); }, 3, 0, 0,
                              "PackedWeights: the file ended after 0 bytes of a matrix");
            if (threads == 1)  // else it depends on who fails first
                expect_read_error([&] { pack(-1, 0); }, 3, 0, EBADF,
                                  "PackedWeights: Bad file descriptor after 0 bytes of a matrix");
            pack(whole.descriptor(), 0);
        }
    }
}

}  // namespace

void add_packed_files_tests(std::vector<Test>& tests) {
    tests.insert(tests.end(),
                 {{"packed_files_have_the_bytes_of_packed_tensors",
                   test_packed_files_have_the_bytes_of_packed_tensors},
                  {"packed_files_are_shared_by_threads", test_packed_files_are_shared_by_threads},
                  {"many_groups_are_packed_in_one_call", test_many_groups_are_packed_in_one_call},
                  {"nothing_is_packed_if_one_group_cannot_be",
                   test_nothing_is_packed_if_one_group_cannot_be},
                  {"packed_files_name_the_bad_argument", test_packed_files_name_the_bad_argument},
                  {"packed_files_say_where_a_file_ended_or_failed",
                   test_packed_files_say_where_a_file_ended_or_failed}});
}

}  // namespace moecore::test
