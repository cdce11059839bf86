#include "moecore/ep_schedule.hpp"

#include <algorithm>
#include <cmath>

#include "moecore/error.hpp"

namespace moecore {
namespace {

/// Microseconds of a layer's parts.
struct Costs {
    double dispatch, back, compute;
    double plan = 0.0;
    bool overlaps_back = true;     ///< a group's results leave under the next one's computation
    bool writes_directly = false;  ///< results leave under the computation itself
};

constexpr double kMostScratch = 2e9;  ///< bytes that an all-gather may take unasked

double us_of_bytes(double bytes, double gbps) { return bytes / (gbps * 1e3); }

double rounded(double us) { return std::round(us * 10.0) / 10.0; }

/// Reading a rank's experts once, or their flops, whichever takes longer.
double compute_us(const LayerLoad& load, const MachineFigures& figures) {
    const double matrix = 3.0 * static_cast<double>(load.hidden_size * load.intermediate_size);
    const double experts = static_cast<double>(load.num_experts) / load.num_ranks;
    const double routes = static_cast<double>(load.total_tokens * load.top_k) / load.num_ranks;
    const double bytes =
        matrix * std::min(experts, routes) * static_cast<double>(load.element_bytes);
    const double flops = 2.0 * matrix * routes;
    return std::max(us_of_bytes(bytes, figures.memory_gbps),
                    flops / (figures.compute_gflops * 1e3));
}

Costs all_to_all_costs(const LayerLoad& load, const MachineFigures& figures) {
    const double ranks = load.num_ranks;
    const auto tokens = static_cast<double>(load.max_tokens);
    const auto row = static_cast<double>(load.hidden_size * load.element_bytes);
    const double visited = 1.0 - std::pow(1.0 - 1.0 / ranks, load.top_k);
    const double remote_routes = load.top_k * (ranks - 1.0) / ranks;
    const double copies_us = us_of_bytes(tokens * (ranks - 1.0) * visited * row, figures.link_gbps);
    const double routes_us = us_of_bytes(tokens * remote_routes * row, figures.link_gbps);
    return {copies_us,
            load.returns_sums ? copies_us : routes_us,
            compute_us(load, figures),
            static_cast<double>(load.total_tokens * load.top_k) * figures.plan_ns_per_route * 1e-3,
            !load.returns_sums,
            load.writes_directly && !load.returns_sums};
}

Costs all_gather_costs(const LayerLoad& load, const MachineFigures& figures) {
    const double bytes =
        static_cast<double>(load.max_tokens * load.hidden_size * load.element_bytes) *
        (load.num_ranks - 1);
    // Written one by one, only those results cross that there are, and not room for all.
    const double ranks_that_return = load.writes_directly ? load.num_ranks : 1.0;
    return {.dispatch = us_of_bytes(bytes, figures.link_gbps),
            .back = us_of_bytes(bytes * load.top_k / ranks_that_return, figures.link_gbps),
            .compute = compute_us(load, figures),
            .writes_directly = load.writes_directly};
}

/// The first arrival and the last departure stand alone; between them the longer of computation and
/// communication counts. Collectives agree on routes, and each group adds two.
double all_to_all_us(const Costs& costs, const MachineFigures& figures, int num_groups) {
    if (costs.writes_directly)
        return figures.host_wait_us + costs.plan + figures.group_us * (num_groups - 1) +
               figures.link_latency_us * (figures.plan_collectives + 1.0) + costs.dispatch +
               std::max(costs.compute, costs.back);
    const double cut = costs.dispatch + (costs.overlaps_back ? costs.back : 0.0);  // into groups
    const double ends = cut / num_groups + (costs.overlaps_back ? 0.0 : costs.back);
    const double inner_share = 1.0 - 1.0 / num_groups;
    return figures.host_wait_us + costs.plan + figures.group_us * (num_groups - 1) +
           figures.link_latency_us * (figures.plan_collectives + 2.0 * num_groups) + ends +
           std::max(costs.compute, costs.compute / num_groups + cut * inner_share);
}

double all_gather_us(const Costs& costs, const MachineFigures& figures) {
    if (costs.writes_directly)
        return figures.link_latency_us + costs.dispatch + std::max(costs.compute, costs.back);
    return 3.0 * figures.link_latency_us + costs.dispatch + costs.compute + costs.back;
}

/// Bytes of scratch memory of an all-gather, which has room for every slot of every rank.
double gather_scratch(const LayerLoad& load) {
    const auto tokens = static_cast<double>(load.max_tokens);
    const auto hidden = static_cast<double>(load.hidden_size);
    const double all_slots = tokens * load.top_k * load.num_ranks;
    const double slots_there_and_back =
        load.writes_directly ? tokens * load.top_k : 3.0 * all_slots;
    return static_cast<double>(load.element_bytes) *
           (tokens * load.num_ranks * hidden +
            all_slots * static_cast<double>(load.intermediate_size) +
            slots_there_and_back * hidden);
}

std::string groups_text(int num_groups) {
    return concat(num_groups, num_groups == 1 ? " group" : " groups");
}

/// combine="fast" returns as many rows as are dispatched.
std::string what_sums_would_save(const LayerLoad& load, const Costs& costs) {
    if (load.returns_sums || costs.writes_directly || costs.dispatch >= costs.back) return "";
    return concat("; with combine=\"fast\", whose bits are others, return ",
                  rounded(costs.dispatch), " us");
}

}  // namespace

MachineFigures typical_figures(DeviceType type) {
    if (type == DeviceType::kCpu) return {};
    return {.link_gbps = 300,
            .link_latency_us = 25,
            .compute_gflops = 5e5,
            .memory_gbps = 2500,
            .host_wait_us = 60,
            .plan_ns_per_route = 0.5,  // by the device
            .plan_collectives = 1,
            .group_us = 80};
}

ScheduleChoice choose_schedule(const LayerLoad& load, const MachineFigures& figures,
                               Schedule schedule, int num_groups) {
    const Costs costs = all_to_all_costs(load, figures);
    ScheduleChoice best;
    std::string compared;
    const auto consider = [&](Schedule candidate, int groups, double us) {
        compared += concat(compared.empty() ? "" : ", ",
                           candidate == Schedule::kAllGather
                               ? std::string("all-gather")
                               : concat("all-to-all in ", groups_text(groups)),
                           " ", rounded(us), " us");
        if (best.predicted_us == 0.0 || us < best.predicted_us) best = {candidate, groups, us, ""};
    };
    if (schedule != Schedule::kAllGather)
        for (const int groups : {1, 2, 4})
            if (groups == 1 || (num_groups == 0 && !load.writes_directly)) {
                const int wanted = num_groups == 0 ? groups : num_groups;
                consider(Schedule::kAllToAll, wanted, all_to_all_us(costs, figures, wanted));
            }
    const double scratch = gather_scratch(load);
    const bool is_too_large = schedule == Schedule::kAuto && scratch > kMostScratch;
    if (is_too_large)
        compared += concat(", all-gather left out: it needs ", rounded(scratch * 1e-9),
                           " GB of scratch memory");
    if (schedule != Schedule::kAllToAll && !is_too_large)
        consider(Schedule::kAllGather, 1, all_gather_us(all_gather_costs(load, figures), figures));
    best.reason = concat(best.schedule == Schedule::kAllGather
                             ? std::string("all-gather")
                             : concat("all-to-all in ", groups_text(best.num_groups)),
                         ": predicted ", compared, "; dispatch ", rounded(costs.dispatch),
                         ", experts ", rounded(costs.compute), ", return ", rounded(costs.back),
                         costs.writes_directly ? " us under the experts at " : " us at ",
                         rounded(figures.link_gbps), " GB/s and ", rounded(figures.link_latency_us),
                         " us a call", what_sums_would_save(load, costs));
    return best;
}

}  // namespace moecore
