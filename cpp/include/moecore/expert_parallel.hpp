#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "moecore/ep_schedule.hpp"
#include "moecore/moe_layer.hpp"
#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"
#include "moecore/transport.hpp"

namespace moecore {

/// Time that the layers since start_trace() spent in one phase, the waits of a rank included.
struct PhaseTime {
    std::string name;
    bool is_communication = false;
    int64_t count = 0;
    double total_us = 0.0;
};

/// The part of a MoELayer that spans ranks: sends tokens to the ranks that own their experts, runs
/// this rank's experts on what arrives, and sends the results back. One per rank, shared by all its
/// layers: it owns scratch memory that grows to the largest call, and what carries communication
/// beside the computation (a thread, or a stream).
///
/// Every rank makes the same calls in the same order, one at a time. If a call throws, the group is
/// aborted: all ranks throw.
class ExpertParallel {
public:
    /// `transport` must outlive this.
    explicit ExpertParallel(Transport& transport);
    ~ExpertParallel();
    ExpertParallel(const ExpertParallel&) = delete;
    ExpertParallel& operator=(const ExpertParallel&) = delete;

    /// What a layer asks for: T tokens of this rank, routed.
    struct Call {
        const MoEConfig& config;
        const MoEWeights& weights;
        const ExpertParallelConfig& how;
        TensorView hidden_states;  ///< [T, H]
        TensorView topk_ids;       ///< [T, k] int32
        TensorView topk_weights;   ///< [T, k] float32
        TensorView output;         ///< [T, H], out
        /// The shared expert's output [T, H] and its scale, or absent views.
        std::function<TensorView(TensorView& shared_scale)> run_shared;
    };
    /// Throws TransportError if a rank fails, is late, or has a layer of other sizes.
    void forward(const Call& call, Stream stream);

    /// What Schedule::kAuto counts with. The same on every rank.
    const MachineFigures& figures() const { return figures_; }
    void set_figures(const MachineFigures& figures) { figures_ = figures; }

    /// Measures the transport between all ranks and sets its figures; the others stay. Collective.
    void measure();

    /// With F > 0, calls from now on are those of layers with fixed_tokens = F, whatever they were
    /// made with; 0 ends that. Every rank must do so between the same calls. For graphs of passes
    /// with different F. Throws InvalidArgument if F < 0.
    void fix_tokens(int64_t tokens);

    /// How the last call's rows travelled, and why.
    const ScheduleChoice& last_choice() const { return choice_; }

    /// Records phases from now on, without what was recorded before.
    void start_trace();
    /// The phases since start_trace(), and their times as events of a Chrome trace, to be joined
    /// with commas: {"traceEvents":[ events of every rank ]}. Perfetto reads it too.
    std::vector<PhaseTime> phase_times();
    std::string trace_events();

    Transport& transport() { return transport_; }

private:
    struct State;
    void run(const Call& call, Stream stream);
    void run_fixed(const Call& call, int64_t tokens_per_rank,
                   const std::vector<ExpertRange>& ranges, Stream stream);

    Transport& transport_;
    MachineFigures figures_;
    ScheduleChoice choice_;
    int64_t fixed_tokens_ = 0;  ///< of all layers; 0: each has its own
    std::unique_ptr<State> state_;
};

}  // namespace moecore
