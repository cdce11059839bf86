#include "moecore/expert_parallel.hpp"

#include <algorithm>
#include <vector>

#include "moecore/combine.hpp"
#include "moecore/error.hpp"
#include "moecore/workspace.hpp"
#include "runtime/agreement.hpp"
#include "runtime/comm_lane.hpp"

namespace moecore {
namespace {

/// A view of host numbers that an op reads.
template <typename T>
TensorView view_of(std::vector<T>& numbers, DType dtype) {
    return {numbers.data(), dtype, {static_cast<int64_t>(numbers.size())}};
}

/// Scratch tensors of one call. R rows of this rank's experts.
struct Scratch {
    TensorView copies;  ///< [copies received, H]
    TensorView inner;   ///< [R, I]
    TensorView rows;    ///< [R, H]
    TensorView back;    ///< [results received, H]

    Scratch(const ExpertParallel::Call& call, int64_t num_copies, int64_t num_rows,
            int64_t num_back, Workspace& workspace) {
        const MoEConfig& config = call.config;
        const auto bytes = [&](int64_t rows_of, int64_t width) {
            return Workspace::bytes_for(config.dtype, {rows_of, width});
        };
        workspace.grow(bytes(num_copies + num_back + num_rows, config.hidden_size) +
                       bytes(num_rows, config.intermediate_size) + 4 * bytes(1, 1));
        copies = workspace.take(config.dtype, {num_copies, config.hidden_size});
        inner = workspace.take(config.dtype, {num_rows, config.intermediate_size});
        rows = workspace.take(config.dtype, {num_rows, config.hidden_size});
        back = workspace.take(config.dtype, {num_back, config.hidden_size});
    }
};

char* row_of(const TensorView& rows, int64_t row, size_t row_bytes) {
    return static_cast<char*>(rows.data) + static_cast<size_t>(row) * row_bytes;
}

}  // namespace

struct ExpertParallel::State {
    std::unique_ptr<CommLane> inline_lane = make_inline_lane();
    std::unique_ptr<CommLane> thread_lane;  ///< made when a call first overlaps
    Workspace workspace{Device{}, 0};
    int64_t num_calls = 0;
};

namespace {

/// One call: the plan, and its phases. Lives until the lane is idle.
class Exchange {
public:
    Exchange(Transport& transport, const ExpertParallel::Call& call, int num_groups,
             const Agreement& agreement, Workspace& workspace)
        : transport_(transport),
          call_(call),
          places_(agreement.ranges, num_groups),
          plan_(make_dispatch_plan(places_, transport.rank(), call.config.routing.top_k,
                                   agreement.ids)),
          row_bytes_(static_cast<size_t>(call.config.hidden_size) * size_of(call.config.dtype)),
          scratch_(call, plan_.received.total(), plan_.sent_back.total(),
                   plan_.received_back.total(), workspace),
          group_offsets_(plan_.expert_offsets) {}

    int num_groups() const { return places_.num_groups(); }

    /// Sends the copies of tokens that `group` needs first.
    void dispatch(int group, Stream stream) {
        const TensorView& x = call_.hidden_states;
        transport_.all_to_all_v(
            "dispatch",
            {.data = x.data,
             .row_stride = static_cast<size_t>(x.strides[0]) * size_of(x.dtype),
             .index = plan_.sent_tokens.data() + plan_.sent.before(group),
             .counts = plan_.sent.of_group(group)},
            {.data = row_of(scratch_.copies, plan_.received.before(group), row_bytes_),
             .counts = plan_.received.of_group(group)},
            row_bytes_, stream);
    }

    /// Both GEMMs of the experts of `group`: those of other groups have no rows in its offsets.
    void run_experts(int group, Stream stream) {
        const int rank = transport_.rank();
        const auto offset = [&](int local) {
            return plan_.expert_offsets[static_cast<size_t>(local)];
        };
        const int64_t begin = offset(places_.group_begin(rank, group));
        const int64_t end = offset(places_.group_begin(rank, group + 1));
        for (size_t e = 0; e < group_offsets_.size(); ++e)
            group_offsets_[e] = std::clamp(plan_.expert_offsets[e], begin, end);
        const TensorView offsets = view_of(group_offsets_, DType::kInt64);
        const MoEWeights& weights = call_.weights;
        grouped_gemm(scratch_.copies, weights.gate_up, weights.gate_up_bias, offsets,
                     view_of(plan_.sorted_slots, DType::kInt32), call_.config.routing.top_k,
                     call_.config.activation, scratch_.inner, stream);
        grouped_gemm(scratch_.inner, weights.down, weights.down_bias, offsets, {}, 1, {},
                     scratch_.rows, stream);
    }

    /// Sends every route's result of `group` to the token's owner.
    void send_back(int group, Stream stream) {
        transport_.all_to_all_v(
            "return",
            {.data = scratch_.rows.data,
             .row_stride = row_bytes_,
             .index = plan_.back_rows.data() + plan_.sent_back.before(group),
             .counts = plan_.sent_back.of_group(group)},
            {.data = row_of(scratch_.back, plan_.received_back.before(group), row_bytes_),
             .counts = plan_.received_back.of_group(group)},
            row_bytes_, stream);
    }

    /// Adds every token's results in the order of its choices, and the shared expert's.
    void combine_results(const TensorView& shared, const TensorView& shared_scale, Stream stream) {
        combine(scratch_.back, view_of(plan_.slot_to_back, DType::kInt32), call_.topk_weights,
                shared, shared_scale, call_.output, stream);
    }

private:
    Transport& transport_;
    const ExpertParallel::Call& call_;
    ExpertPlaces places_;
    DispatchPlan plan_;
    size_t row_bytes_;
    Scratch scratch_;
    std::vector<int64_t> group_offsets_;
};

/// The pipeline: while a group is in its GEMMs the next one arrives and the last one leaves. The
/// shared expert runs under the first dispatch.
void run_pipeline(Exchange& exchange, const ExpertParallel::Call& call, CommLane& lane,
                  Stream stream) {
    const int num_groups = exchange.num_groups();
    const auto dispatch = [&](int group) {
        return lane.submit([&exchange, group](Stream s) { exchange.dispatch(group, s); }, stream);
    };
    int64_t arriving = dispatch(0);
    TensorView shared_scale;
    const TensorView shared = call.run_shared(shared_scale);
    int64_t leaving = 0;
    for (int group = 0; group < num_groups; ++group) {
        const int64_t arrived = arriving;
        if (group + 1 < num_groups) arriving = dispatch(group + 1);
        lane.wait(arrived, stream);
        exchange.run_experts(group, stream);
        leaving =
            lane.submit([&exchange, group](Stream s) { exchange.send_back(group, s); }, stream);
    }
    lane.wait(leaving, stream);
    exchange.combine_results(shared, shared_scale, stream);
}

}  // namespace

ExpertParallel::ExpertParallel(Transport& transport)
    : transport_(transport), state_(std::make_unique<State>()) {}
ExpertParallel::~ExpertParallel() = default;

void ExpertParallel::forward(const Call& call, Stream stream) {
    State& state = *state_;
    const Agreement agreement =
        agree(transport_, call.config, call.how, ++state.num_calls, call.topk_ids.as<int32_t>(),
              call.topk_weights.as<float>(), call.hidden_states.shape[0]);
    const int num_groups = std::max(call.how.num_groups, 1);
    Exchange exchange(transport_, call, num_groups, agreement, state.workspace);
    const bool overlaps = num_groups > 1 || call.config.shared_intermediate_size > 0;
    if (overlaps && state.thread_lane == nullptr) state.thread_lane = make_thread_lane();
    CommLane& lane = overlaps ? *state.thread_lane : *state.inline_lane;
    try {
        run_pipeline(exchange, call, lane, stream);
    } catch (const std::exception& error) {
        // The lane may still be inside a call that reads `exchange`: end it first.
        transport_.abort(error.what());
        try {
            lane.wait(lane.submit([](Stream) {}, stream), stream);
        } catch (const std::exception&) {  // NOLINT: the first error is the one to report
        }
        throw;
    }
}

}  // namespace moecore
