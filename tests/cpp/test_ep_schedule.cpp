#include <algorithm>
#include <cmath>

#include "moecore/ep_schedule.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

void schedule_follows_the_figures() {
    LayerLoad load{.num_ranks = 8,
                   .hidden_size = 4096,
                   .intermediate_size = 1536,
                   .num_experts = 128,
                   .top_k = 8,
                   .element_bytes = 2,
                   .max_tokens = 4096,
                   .total_tokens = 8 * 4096};
    const MachineFigures gpu{.link_gbps = 300,
                             .link_latency_us = 12,
                             .compute_gflops = 6e5,
                             .memory_gbps = 3000,
                             .host_wait_us = 60};
    const ScheduleChoice prefill = choose_schedule(load, gpu);
    expect(prefill.schedule == Schedule::kAllToAll && prefill.num_groups > 1,
           "a long prefill overlaps: " + prefill.reason);
    load.max_tokens = 1;
    load.total_tokens = 8;
    const ScheduleChoice decode = choose_schedule(load, gpu);
    expect(decode.schedule == Schedule::kAllGather,
           "a token a rank waits for no host: " + decode.reason);
    // Two H100, a layer of Qwen3-30B-A3B. Dear calls forbid groups, but cost less than the rows
    // that an all-gather returns in vain; cheap ones let groups pay where there is much to hide.
    MachineFigures h100 = typical_figures(DeviceType::kCuda);
    h100.link_gbps = 244;
    h100.link_latency_us = 230;
    LayerLoad qwen3{.num_ranks = 2,
                    .hidden_size = 2048,
                    .intermediate_size = 768,
                    .num_experts = 128,
                    .top_k = 8,
                    .element_bytes = 2,
                    .max_tokens = 8192,
                    .total_tokens = 2 * 8192};
    const ScheduleChoice dear = choose_schedule(qwen3, h100);
    expect(dear.schedule == Schedule::kAllToAll && dear.num_groups == 1, dear.reason);
    h100.link_latency_us = 25;
    const ScheduleChoice cheap = choose_schedule(qwen3, h100);
    expect(cheap.schedule == Schedule::kAllToAll && cheap.num_groups == 2, cheap.reason);
    h100.group_us = 400;
    expect(choose_schedule(qwen3, h100).num_groups == 1, "what a group costs the GEMMs counts");
    // Sums are a third of the rows here, but leave after the last group.
    h100.group_us = 0;
    LayerLoad sums = qwen3;
    sums.returns_sums = true;
    const ScheduleChoice exact = choose_schedule(qwen3, h100, Schedule::kAllToAll, 1);
    const ScheduleChoice fast = choose_schedule(sums, h100, Schedule::kAllToAll, 1);
    const double rows_us = 8192 * 4096 / 244e3;  // one row a token
    expect_close(exact.predicted_us - fast.predicted_us, rows_us * (4 - (1 - std::pow(0.5, 8))),
                 1e-6, DType::kFloat32, fast.reason);
    const ScheduleChoice groups = choose_schedule(sums, h100, Schedule::kAllToAll, 4);
    const double hidden_us = rows_us * (1 - std::pow(0.5, 8)) * 0.75;
    expect_close(fast.predicted_us - groups.predicted_us, hidden_us - 6 * 25, 1e-6, DType::kFloat32,
                 "groups hide what is dispatched, and add six calls: " + groups.reason);
    expect(exact.reason.find("with combine=\"fast\", whose bits are others, return 137") !=
               std::string::npos,
           exact.reason);
    expect(fast.reason.find("combine=") == std::string::npos, fast.reason);
    h100.group_us = 400;
    qwen3.max_tokens = 64;
    qwen3.total_tokens = 128;
    expect(choose_schedule(qwen3, h100).schedule == Schedule::kAllGather, "few tokens");
    expect(typical_figures(DeviceType::kCpu).plan_collectives == 2, "routes, and their sizes");
    const ScheduleChoice forced = choose_schedule(load, gpu, Schedule::kAllToAll, 3);
    expect(forced.schedule == Schedule::kAllToAll && forced.num_groups == 3, "no choice left");
    expect(forced.reason.find("all-to-all in 3 groups") != std::string::npos, forced.reason);
}

void direct_writes_hide_the_return() {
    const MachineFigures gpu{.link_gbps = 400,
                             .link_latency_us = 20,
                             .compute_gflops = 5e5,
                             .memory_gbps = 2500,
                             .host_wait_us = 60,
                             .plan_ns_per_route = 0.5,
                             .plan_collectives = 1,
                             .group_us = 80};
    LayerLoad load{.num_ranks = 8,
                   .hidden_size = 7168,
                   .intermediate_size = 2048,
                   .num_experts = 256,
                   .top_k = 8,
                   .element_bytes = 2,
                   .max_tokens = 4096,
                   .total_tokens = 8 * 4096,
                   .writes_directly = true};
    const double row_us = 7168 * 2 / 400e3, routes = 4096 * 8;
    const double experts_us = 2.0 * 3 * 7168 * 2048 * routes / 5e8;
    const double return_us = routes * 7 / 8 * row_us;
    const ScheduleChoice prefill = choose_schedule(load, gpu);
    expect(prefill.schedule == Schedule::kAllToAll && prefill.num_groups == 1,
           "nothing is left for groups to hide: " + prefill.reason);
    expect(prefill.reason.find("2 groups") == std::string::npos, prefill.reason);
    const double copies = 4096 * 7 * (1 - std::pow(7.0 / 8, 8));
    expect_close(
        prefill.predicted_us,
        60 + 0.5e-3 * 8 * routes + 2 * 20 + copies * row_us + std::max(experts_us, return_us), 1e-6,
        DType::kFloat32, prefill.reason);
    const ScheduleChoice gathered = choose_schedule(load, gpu, Schedule::kAllGather);
    expect_close(gathered.predicted_us, 20 + 4096 * 7 * row_us + std::max(experts_us, return_us),
                 1e-6, DType::kFloat32, gathered.reason);
    load.num_ranks = 2;
    load.total_tokens = 2 * 4096;
    expect(choose_schedule(load, gpu).schedule == Schedule::kAllGather,
           "nearly every token goes to both ranks, and no host waits");
    load.max_tokens = 16384;
    load.total_tokens = 2 * 16384;
    const ScheduleChoice large = choose_schedule(load, gpu);
    expect(large.schedule == Schedule::kAllToAll, large.reason);
    // Tokens of both ranks, room for all their slots, and a result for each of this rank's.
    const double scratch = 2.0 * (2 * 16384 * 7168.0 + 2 * 131072 * 2048.0 + 131072 * 7168.0);
    const std::string left_out =
        concat("all-gather left out: it needs ", std::round(scratch * 1e-8) / 10, " GB of scratch");
    expect(large.reason.find(left_out) != std::string::npos, large.reason);
    expect(choose_schedule(load, gpu, Schedule::kAllGather).schedule == Schedule::kAllGather,
           "who asks for it gets it");
    load.max_tokens = 4096;
    load.total_tokens = 2 * 4096;
    load.returns_sums = true;
    const ScheduleChoice sums = choose_schedule(load, gpu, Schedule::kAllToAll, 1);
    expect(sums.predicted_us > 60 + 4096 * 2 * (1 - std::pow(0.5, 8)) * row_us + experts_us,
           "sums leave after the experts: " + sums.reason);
    expect(sums.reason.find("under") == std::string::npos, sums.reason);
}

}  // namespace

void add_ep_schedule_tests(std::vector<Test>& tests) {
    tests.push_back({"schedule follows the figures", schedule_follows_the_figures});
    tests.push_back({"schedule of direct writes", direct_writes_hide_the_return});
}

}  // namespace moecore::test
