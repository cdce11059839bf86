#include <set>

#include "moecore/error.hpp"
#include "ranks.hpp"
#include "runtime/lent_rows.hpp"
#include "test_main.hpp"
#include "transport/peer_memory_cache.hpp"

namespace moecore::test {
namespace {

/// Memory of another process that cannot be opened twice, nor over what is open, as a driver has
/// it.
class FakeMemory {
public:
    explicit FakeMemory(const cuda::IpcHandle& name) : block_(name[0]) {
        expect(open_blocks().insert(block_).second, "the block is not open already");
        ++num_opened();
    }
    ~FakeMemory() { open_blocks().erase(block_); }
    char* data() const { return bytes_; }

    static std::set<char>& open_blocks() {
        static std::set<char> blocks;
        return blocks;
    }
    static int& num_opened() {
        static int count = 0;
        return count;
    }

private:
    static inline char bytes_[16] = {};
    char block_;
};

void memory_of_a_process_is_opened_once() {
    constexpr uint64_t kBlock = 2 << 20;
    // The name says which block, and which of its allocations.
    const auto place = [](char block, char version, size_t offset) {
        return cuda::ExportedMemory{.allocation = {block, version},
                                    .offset = offset,
                                    .start = static_cast<uint64_t>(block) * kBlock + 512 * version,
                                    .bytes = 512};
    };
    int num_waits = 0;
    PeerMemoryCache<FakeMemory> cache;
    const auto find = [&](const cuda::ExportedMemory& p) {
        return cache.find(p, [&] { ++num_waits; });
    };
    const char* first = find(place(1, 0, 3));
    expect(find(place(1, 0, 5)) == first + 2, "the offset counts");
    expect(FakeMemory::num_opened() == 1 && num_waits == 0, "what is open stays open");
    find(place(1, 1, 0));  // freed, and something else lies there now
    expect(FakeMemory::num_opened() == 2 && num_waits == 1,
           "the old one goes when copies are done");
    for (char block = 2; block < 20; ++block) find(place(block, 0, 0));
    expect(FakeMemory::open_blocks().size() == 8, "the oldest goes");
    expect(num_waits == 1 + 11, "after a wait");
    // What was found last stays: several pieces of memory are in use at a time.
    const char* used = find(place(12, 0, 0));
    find(place(30, 0, 0));
    find(place(31, 0, 0));
    const int opened = FakeMemory::num_opened();
    expect(find(place(12, 0, 0)) == used && FakeMemory::num_opened() == opened,
           "who was found lately is not the first to go");
}

void threads_lend_memory() {
    Transports transports = make_in_process_transports(3);
    Array memory[3] = {Array(kF32, 3), Array(kF32, 3), Array(kF32, 3)};
    run_all_ranks(3, [&](int rank) {
        Transport& transport = *transports[static_cast<size_t>(rank)];
        expect(transport.can_lend(), "threads reach each other's memory");
        const LentMemory mine[] = {{memory[rank].data(), 12}, {}};
        const int64_t notes[] = {rank * 7};
        const Loans loans = transport.lend("lend", mine, notes, {});
        for (size_t r = 0; r < 3; ++r) {
            expect(loans.memory[2 * r].data == memory[r].data() &&
                       loans.memory[2 * r].bytes == 12 && loans.memory[2 * r + 1].bytes == 0,
                   "what rank r lends");
            expect(loans.notes[r] == static_cast<int64_t>(r) * 7, "what it says of it");
            static_cast<float*>(loans.memory[2 * r].data)[rank] = static_cast<float>(rank + 1);
        }
        transport.finish_writes("write", {});
        for (int r = 0; r < 3; ++r) expect(memory[rank][r] == r + 1, "all have written");
    });
    Transports others = shm_transports(2);
    expect(!others[0]->can_lend(), "processes do not");
    try {
        others[0]->lend("lend", {}, {}, {});
        expect(false, "lend must throw");
    } catch (const UnsupportedError& error) {
        expect(
            std::string(error.what()) == "Transport: shm lends no memory, asked to in phase 'lend'",
            error.what());
    }
}

void shared_rows_reach_all_and_are_padded() {
    constexpr int64_t kRanks = 3, kRows = 4, kWidth = 5;
    Transports transports = make_in_process_transports(kRanks);
    run_all_ranks(kRanks, [&](int rank) {
        Transport& transport = *transports[static_cast<size_t>(rank)];
        Array ids(DType::kInt32, kRanks * kRows * kWidth), rows(kBf16, kRanks * kRows * kWidth);
        Array back(kBf16, kRows * kWidth), mine(DType::kInt32, kRows * kWidth);
        Array row(kBf16, kRows * kWidth);
        ids.fill(7.0);
        rows.fill(7.0);
        mine.fill(rank + 1);
        row.fill(rank + 1);
        const SharedPlaces places =
            lend_shared(transport, "share",
                        {ids.view({kRanks, kRows, kWidth}), rows.view({kRanks, kRows, kWidth})},
                        back.view({kRows, kWidth}), {});
        const int64_t count = rank;  // rank 0 has none
        share_rows(transport,
                   {SharedRows{mine.view({count, kWidth}), true},
                    SharedRows{row.view({count, kWidth}), false}},
                   places, {});
        transport.finish_writes("share", {});
        for (int64_t r = 0; r < kRanks; ++r)
            for (int64_t i = 0; i < kRows * kWidth; ++i) {
                const bool is_there = i / kWidth < r;
                const double wanted = static_cast<double>(r + 1);
                expect(ids[r * kRows * kWidth + i] == (is_there ? wanted : -1.0), "padded with -1");
                expect(rows[r * kRows * kWidth + i] == (is_there ? wanted : 7.0), "or left");
            }
        transport.barrier("all have looked");
    });
}

void ranks_that_expect_other_rows_are_noticed() {
    Transports transports = make_in_process_transports(2);
    const auto errors = run_ranks(2, [&](int rank) {
        // Rank 0 sends rank 1 two rows, but that expects three.
        RowCounts sent(1, 2), received(1, 2), none(1, 2);
        if (rank == 0) sent.at(0, 1) = 2;
        if (rank == 1) received.at(0, 0) = 3;
        Array memory(kF32, 12), addresses(DType::kInt64, 2);
        const TensorView nowhere = addresses.view({0});
        lend_rows(*transports[static_cast<size_t>(rank)],
                  {CrossingRows{sent, received, memory.view({3, 4}), {}, addresses.view({2})},
                   CrossingRows{none, none, memory.view({3, 4}), {}, nowhere}},
                  {});
    });
    try {
        std::rethrow_exception(errors[0]);
    } catch (const TransportError& error) {
        expect(error.rank() == 1 && std::string(error.what()) ==
                                        "rank 1 is out of step in phase 'lend': it expects 3 rows, "
                                        "got 2",
               error.what());
    }
}

}  // namespace

void add_lent_memory_tests(std::vector<Test>& tests) {
    tests.push_back({"threads lend memory", threads_lend_memory});
    tests.push_back({"shared rows", shared_rows_reach_all_and_are_padded});
    tests.push_back({"ranks that expect other rows", ranks_that_expect_other_rows_are_noticed});
    tests.push_back({"memory is opened once", memory_of_a_process_is_opened_once});
}

}  // namespace moecore::test
