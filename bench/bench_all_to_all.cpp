// Rows between ranks: microseconds and GB/s of all_to_all_v by bytes a pair, and of the smallest
// exchanges.
//
// floor: what a rank sends to others, over the rate at which one thread copies memory that misses
// the caches (CPU; each byte is written and read once more on its way), or over the largest rate
// seen in this run (NCCL).

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <optional>
#include <vector>

#include "harness.hpp"
#include "moecore/buffer.hpp"
#include "ranks.hpp"

namespace moecore::bench {
namespace {

/// Bytes for each rank; a link of GPUs needs more to reach its rate.
size_t largest(Device device) { return size_t{device.type == DeviceType::kCpu ? 16U : 256U} << 20; }

double copy_gbps() {
    constexpr size_t kBytes = size_t{256} << 20;
    std::vector<char> from(kBytes, 1), to(kBytes, 2);
    double best = 0;
    for (int i = 0; i < 5; ++i) {
        const double start = now_us();
        std::memcpy(to.data(), from.data(), kBytes);
        keep(to);
        best = std::max(best, static_cast<double>(kBytes) / (now_us() - start) * 1e-3);
    }
    return best;
}

struct Timing {
    double median_us, spread;
};

/// Barrier-aligned rounds; the slowest rank's median.
Timing time_rounds(Transport& transport, int repeats, const std::function<void()>& round) {
    for (int i = 0; i < 3; ++i) round();
    transport.synchronize("bench", {});
    std::vector<double> times;
    for (int i = 0; i < repeats; ++i) {
        transport.barrier("bench");
        const double start = now_us();
        round();
        transport.synchronize("bench", {});
        times.push_back(now_us() - start);
    }
    std::sort(times.begin(), times.end());
    const double median_us = median(times);
    const double spread = (times[times.size() * 3 / 4] - times[times.size() / 4]) / median_us;
    const auto worst = max_over_ranks(transport, {median_us, spread});
    return {worst[0], worst[1]};
}

void run(Transport& transport, const Options& options) {
    const auto ranks = static_cast<size_t>(transport.size());
    const size_t most = largest(transport.device());
    Buffer send(transport.device(), most * ranks), recv(transport.device(), most * ranks);
    const bool prints = transport.rank() == 0;
    const double copy = prints ? copy_gbps() : 0.0;
    transport.barrier("bench");
    std::optional<Report> report;
    if (prints) {
        report.emplace(options.json, std::vector<std::string>{"transport", "ranks", "bytes",
                                                              "time_us", "send_gbps", "spread"});
        report->note("one thread copies memory at " + format(copy, 1) + " GB/s");
    }
    const auto print = [&](const std::string& bytes, const Timing& timing, double gbps) {
        if (prints)
            report->row({transport.kind(), std::to_string(ranks), bytes,
                         format(timing.median_us, 1), format(gbps, 2), format(timing.spread, 2)});
    };
    const std::vector<int64_t> none(ranks, 0);
    print("barrier",
          time_rounds(transport, options.repeats * 10, [&] { transport.barrier("bench"); }), 0);
    for (size_t bytes = 64; bytes <= most; bytes *= bytes < 4096 ? 64 : 4) {
        const std::vector<int64_t> counts(ranks, static_cast<int64_t>(bytes));
        const Timing timing = time_rounds(transport, options.repeats, [&] {
            transport.all_to_all_v("bench", {.data = send.data(), .counts = counts},
                                   {.data = recv.data(), .counts = counts}, 1, {});
        });
        const auto remote = static_cast<double>(bytes * (ranks - 1));
        print(std::to_string(bytes), timing, remote / timing.median_us * 1e-3);
    }
}

}  // namespace
}  // namespace moecore::bench

int main(int argc, char** argv) {
    using namespace moecore::bench;
    const RankOptions ranks = take_rank_options(argc, argv);
    const Options options = parse_options(argc, argv, {}, kRankOptions);
    run_group(ranks, [&](moecore::Transport& transport) { run(transport, options); });
}
