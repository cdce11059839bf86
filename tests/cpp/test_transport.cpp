#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>

#include "moecore/transport.hpp"
#include "ranks.hpp"
#include "test_main.hpp"
#include "transport/call_watch.hpp"

namespace moecore::test {
namespace {

void for_each_transport(int size, const std::function<void(Transports&)>& body) {
    Transports in_process = make_in_process_transports(size);
    body(in_process);
    // Rings smaller than a frame and a row make every message wrap and wait.
    Transports shm = shm_transports(size, 64);
    body(shm);
    if (size > 1) return;
    Transports loopback = loopback_transports();
    body(loopback);
}

/// Byte `i` of the row that `source` sends to `target` as its n-th in a round.
uint8_t byte_of(int round, int source, int target, int64_t n, int64_t i) {
    return static_cast<uint8_t>(round * 31 + source * 7 + target * 13 + n * 3 + i);
}

void exchange_random_rows(Transport& transport, int round) {
    const int size = transport.size(), rank = transport.rank();
    Random random(static_cast<uint32_t>(round));  // the same counts on every rank
    const int64_t row_bytes = 1 + random.below(40);
    std::vector<int64_t> counts(static_cast<size_t>(size * size));
    for (int64_t& count : counts) count = std::max<int64_t>(0, random.below(12) - 4);
    std::vector<int64_t> sent, received;
    std::vector<uint8_t> rows;
    for (int other = 0; other < size; ++other) {
        sent.push_back(counts[static_cast<size_t>(rank * size + other)]);
        received.push_back(counts[static_cast<size_t>(other * size + rank)]);
        for (int64_t n = 0; n < sent.back(); ++n)
            for (int64_t i = 0; i < row_bytes; ++i)
                rows.push_back(byte_of(round, rank, other, n, i));
    }
    const auto width = static_cast<size_t>(row_bytes);
    std::vector<int32_t> index;
    if (round % 2 == 1) {  // the same rows through an index, from the last to the first
        const size_t count = rows.size() / width;
        std::vector<uint8_t> reversed;
        for (size_t i = 0; i < count; ++i) {
            index.push_back(static_cast<int32_t>(count - 1 - i));
            const auto begin = rows.begin() + static_cast<int64_t>((count - 1 - i) * width);
            reversed.insert(reversed.end(), begin, begin + row_bytes);
        }
        rows = reversed;
    }
    int64_t total = 0;
    for (const int64_t count : received) total += count;
    std::vector<uint8_t> arrived(static_cast<size_t>(total) * width);
    transport.all_to_all_v("rows",
                           {.data = rows.data(),
                            .row_stride = width,
                            .index = index.empty() ? nullptr : index.data(),
                            .counts = sent},
                           {.data = arrived.data(), .counts = received}, width, {});
    size_t at = 0;
    for (int source = 0; source < size; ++source)
        for (int64_t n = 0; n < received[static_cast<size_t>(source)]; ++n)
            for (int64_t i = 0; i < row_bytes; ++i)
                expect(arrived[at++] == byte_of(round, source, rank, n, i), "a byte is another");
}

void rows_arrive_by_source_rank() {
    for (const int size : {1, 2, 3, 5})
        for_each_transport(size, [&](Transports& transports) {
            run_all_ranks(size, [&](int rank) {
                for (int round = 0; round < 40; ++round)
                    exchange_random_rows(*transports[static_cast<size_t>(rank)], round);
            });
        });
}

void gathers_arrive_by_rank() {
    for_each_transport(3, [](Transports& transports) {
        run_all_ranks(3, [&](int rank) {
            Transport& transport = *transports[static_cast<size_t>(rank)];
            for (int64_t round = 0; round < 50; ++round) {
                const int64_t mine[2] = {rank, round};
                int64_t all[6];
                transport.all_gather("gather", mine, all, sizeof mine);
                for (int64_t r = 0; r < 3; ++r)
                    expect(all[2 * r] == r && all[2 * r + 1] == round, "a rank's word");
                transport.barrier("barrier");
            }
        });
    });
}

/// Runs `body` on every rank and expects each but `except` to fail with `text`, blaming `culprit`.
void expect_all_fail(Transports& transports, int culprit, const std::string& text, int except,
                     const std::function<void(Transport&, int)>& body) {
    const int size = static_cast<int>(transports.size());
    const auto errors =
        run_ranks(size, [&](int rank) { body(*transports[static_cast<size_t>(rank)], rank); });
    for (int rank = 0; rank < size; ++rank) {
        if (rank == except) continue;
        const Failure failure = failure_of(errors[static_cast<size_t>(rank)]);
        expect(failure.text.find(text) != std::string::npos && failure.culprit == culprit,
               concat("rank ", rank, " wanted '", text, "' of ", culprit, ", got '", failure.text,
                      "' of ", failure.culprit));
    }
}

void a_late_rank_is_named_within_the_deadline() {
    for_each_transport(3, [](Transports& transports) {
        const auto start = std::chrono::steady_clock::now();
        for (auto& transport : transports) transport->set_deadline(0.2);
        std::atomic<bool> over{false};
        std::atomic<int> failed{0};
        expect_all_fail(transports, 1, "rank 1 gave no sign in phase 'step' within the deadline", 1,
                        [&](Transport& transport, int rank) {
                            transport.barrier("start");
                            if (rank == 1) {
                                while (!over) std::this_thread::yield();
                                return;
                            }
                            try {
                                transport.barrier("step");
                            } catch (...) {
                                if (++failed == 2) over = true;
                                throw;
                            }
                        });
        const auto took = std::chrono::steady_clock::now() - start;
        expect(took < std::chrono::seconds(10), "long after the deadline");
        // The group is lost: the late rank hears of it too.
        expect_all_fail(transports, 1, "rank 1 gave no sign", -1,
                        [](Transport& transport, int) { transport.barrier("after"); });
    });
}

void an_abort_reaches_every_rank_at_once() {
    for_each_transport(3, [](Transports& transports) {
        expect_all_fail(transports, 2,
                        "rank 2 has failed in phase 'start': out of disk. Every rank needs", 2,
                        [](Transport& transport, int rank) {
                            transport.barrier("start");
                            if (rank == 2)
                                transport.abort("out of disk");
                            else
                                transport.barrier("step");
                        });
    });
}

void an_error_that_names_a_rank_reaches_the_others_as_it_is() {
    for_each_transport(3, [](Transports& transports) {
        expect_all_fail(transports, 1, "rank 1 differs", 2, [](Transport& transport, int rank) {
            transport.barrier("start");
            if (rank == 2)
                transport.abort_because(TransportError(1, "step", "rank 1 differs"));
            else
                transport.barrier("step");
        });
    });
    for_each_transport(2, [](Transports& transports) {
        expect_all_fail(transports, 1, "rank 1 has failed in phase 'start': nobody knows", 1,
                        [](Transport& transport, int rank) {
                            transport.barrier("start");
                            if (rank == 1)
                                transport.abort_because(TransportError(-1, "", "nobody knows"));
                            else
                                transport.barrier("step");
                        });
    });
}

void a_closed_rank_is_named() {
    for_each_transport(3, [](Transports& transports) {
        expect_all_fail(transports, 0, "rank 0 has closed its transport", 0,
                        [&](Transport& transport, int rank) {
                            transport.barrier("start");
                            if (rank == 0)
                                transports[0].reset();
                            else
                                transport.barrier("step");
                        });
    });
}

void who_is_behind_elsewhere_is_blamed() {
    for_each_transport(3, [](Transports& transports) {
        for (int rank = 0; rank < 3; ++rank)
            for (int step = 0; step < (rank == 2 ? 4 : 6); ++step)
                transports[static_cast<size_t>(rank)]->note(step == 3 ? "return" : "dispatch");
        transports[0]->set_deadline(0.25);
        transports[2]->blame("return");  // of others it knows nothing bad
        std::atomic<bool> is_blamed{false};
        expect_all_fail(transports, 2, "rank 2 gave no sign in phase 'return' within the deadline",
                        1, [&](Transport& transport, int rank) {
                            if (rank == 2) {  // goes on only when rank 0 has said where it was
                                while (!is_blamed) std::this_thread::yield();
                                transport.barrier("next");
                            }
                            if (rank != 0) return;
                            try {
                                transport.blame("return");
                            } catch (...) {
                                is_blamed = true;
                                throw;
                            }
                            is_blamed = true;
                        });
        expect_all_fail(transports, 2, "last seen in phase 'return')", -1,
                        [](Transport& transport, int) { transport.check("next"); });
    });
}

void ranks_out_of_step_are_noticed() {
    Transports transports = make_in_process_transports(2);
    const auto errors = run_ranks(2, [&](int rank) {
        char mine[16] = {}, all[32];
        transports[static_cast<size_t>(rank)]->all_gather("sizes", mine, all, rank == 1 ? 16 : 8);
    });
    // Each is out of step for the other; the first to notice speaks for both.
    const Failure first = failure_of(errors[0]), second = failure_of(errors[1]);
    expect(first.text.find("is out of step in phase 'sizes': it sent ") != std::string::npos,
           first.text);
    expect(first.text == second.text && first.culprit == second.culprit, second.text);
}

void shm_arguments_are_checked() {
    expect_invalid([] { make_shm_transport({.name = "a/b", .rank = 0, .size = 1}); },
                   "make_shm_transport: name must be 1 to 200 of A-Z a-z 0-9 _ . -, got 'a/b'");
    expect_invalid([] { make_shm_transport({.name = "a", .rank = 2, .size = 2}); },
                   "rank must be in [0, size), got 2 with size 2");
    expect_invalid([] { make_shm_transport({.name = "a", .rank = 0, .size = 0}); },
                   "size must be in [1, 256], got 0");
    expect_invalid(
        [] {
            make_shm_transport({.name = concat("test-full-", getpid()),
                                .rank = 0,
                                .size = 16,
                                .ring_bytes = size_t{1} << 40});
        },
        "/dev/shm must have");
    expect_invalid([] { make_in_process_transports(0); }, "size must be in [1, 256], got 0");
    expect_invalid([] { make_loopback_transport()->set_deadline(0); },
                   "deadline must be > 0 seconds, got 0");
}

void a_missing_rank_is_named_when_connecting() {
    const std::string name = concat("test-missing-", getpid());
    const auto errors = run_ranks(2, [&](int rank) {
        make_shm_transport({.name = name, .rank = rank, .size = 3, .connect_deadline = 0.3});
    });
    for (const auto& error : errors) {
        const Failure failure = failure_of(error);
        expect(failure.culprit == 2 && failure.phase == "connect" &&
                   failure.text.find("rank 2 of 3 has not connected") != std::string::npos,
               failure.text);
    }
    expect(shm_open(("/moecore." + name).c_str(), O_RDONLY, 0) == -1, "a segment is left");
}

void ranks_of_different_sizes_do_not_meet() {
    const std::string name = concat("test-sizes-", getpid());
    const auto errors = run_ranks(2, [&](int rank) {
        make_shm_transport({.name = name, .rank = rank, .size = 2 + rank, .connect_deadline = 5});
    });
    for (const auto& error : errors) {
        const Failure failure = failure_of(error);
        expect(failure.culprit == 1 &&
                   failure.text.find("rank 1 was started with size 3, rank 0 with size 2") !=
                       std::string::npos,
               failure.text);
    }
}

void a_call_that_hangs_is_ended() {
    std::atomic<bool> is_ended{false};
    CallWatch watch([&] { is_ended = true; });
    const auto sleep = [](int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); };
    expect(watch.run(10.0, [] { return 7; }) == 7, "what the call returns");
    sleep(150);
    watch.run(10.0, [&] { return sleep(150), 0; });
    expect(!is_ended, "calls within their limits, and none at all, are left alone");
    const auto begin = std::chrono::steady_clock::now();
    watch.run(0.1, [&] {
        while (!is_ended && std::chrono::steady_clock::now() - begin < std::chrono::seconds(10))
            sleep(1);
        return 0;
    });
    expect(is_ended, "a call beyond its limit is ended");
}

}  // namespace

void add_transport_tests(std::vector<Test>& tests) {
    tests.push_back({"rows arrive by source rank", rows_arrive_by_source_rank});
    tests.push_back({"gathers arrive by rank", gathers_arrive_by_rank});
    tests.push_back({"a late rank is named", a_late_rank_is_named_within_the_deadline});
    tests.push_back({"an abort reaches every rank", an_abort_reaches_every_rank_at_once});
    tests.push_back({"an error that names a rank goes on",
                     an_error_that_names_a_rank_reaches_the_others_as_it_is});
    tests.push_back({"a closed rank is named", a_closed_rank_is_named});
    tests.push_back({"who is behind is blamed", who_is_behind_elsewhere_is_blamed});
    tests.push_back({"ranks out of step are noticed", ranks_out_of_step_are_noticed});
    tests.push_back({"shm arguments are checked", shm_arguments_are_checked});
    tests.push_back({"a missing rank is named", a_missing_rank_is_named_when_connecting});
    tests.push_back({"a call that hangs is ended", a_call_that_hangs_is_ended});
    tests.push_back({"sizes must agree", ranks_of_different_sizes_do_not_meet});
}

}  // namespace moecore::test
