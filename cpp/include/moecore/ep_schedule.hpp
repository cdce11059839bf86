#pragma once

#include <cstdint>
#include <string>

#include "moecore/tensor_view.hpp"

namespace moecore {

/// How one layer's rows travel.
enum class Schedule : uint8_t {
    kAuto,       ///< the cheaper one, by choose_schedule
    kAllToAll,   ///< a copy of a token to each rank that needs it; counts on the host
    kAllGather,  ///< all tokens to all ranks, in fixed shapes: no rank waits for a host
};

/// What a group of ranks can do. All ranks must use the same figures: ExpertParallel::measure gives
/// them the slowest rank's.
struct MachineFigures {
    double link_gbps = 5.0;         ///< of one rank's sends to all others together
    double link_latency_us = 20.0;  ///< of one collective without bytes
    double compute_gflops = 50.0;   ///< of one rank's grouped GEMMs
    double memory_gbps = 10.0;      ///< of reading weights
    double host_wait_us = 0.0;      ///< until the host knows routes that a device has made
    double plan_ns_per_route = 20;  ///< of an all-to-all's plan, over the routes of all ranks
    int plan_collectives = 2;       ///< before that plan
    double group_us = 0.0;          ///< what each group after the first adds to the GEMMs
};

/// What ranks on that kind of device count with until they measure: a server's core, or an H100.
MachineFigures typical_figures(DeviceType type);

/// The size of one layer's call.
struct LayerLoad {
    int num_ranks = 1;
    int64_t hidden_size = 0, intermediate_size = 0;
    int num_experts = 0, top_k = 0;
    int64_t element_bytes = 0;
    int64_t max_tokens = 0;    ///< of the rank that has most
    int64_t total_tokens = 0;  ///< of all ranks
    /// CombineMode::kFast: one row a token and rank returns by an all-to-all, after all groups.
    bool returns_sums = false;
    /// Ranks write to each other's memory: results cross while the experts run, and groups would
    /// have nothing to hide.
    bool writes_directly = false;
};

struct ScheduleChoice {
    Schedule schedule = Schedule::kAllToAll;
    int num_groups = 1;
    double predicted_us = 0.0;
    std::string reason;  ///< what was compared, in words and microseconds
};

/// The cheapest of kAllGather and kAllToAll with 1, 2 or 4 groups (1 if ranks write to each other's
/// memory), by counting bytes, flops and collectives under balanced routing. A pure function: ranks
/// with equal arguments agree. `schedule` and `num_groups` other than kAuto and 0 leave no choice.
/// An all-gather that needs more than 2 GB of scratch memory is not chosen unasked.
ScheduleChoice choose_schedule(const LayerLoad& load, const MachineFigures& figures,
                               Schedule schedule = Schedule::kAuto, int num_groups = 0);

}  // namespace moecore
