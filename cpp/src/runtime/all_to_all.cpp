#include "runtime/all_to_all.hpp"

#include <algorithm>
#include <numeric>
#include <optional>

#include "moecore/combine.hpp"
#include "moecore/error.hpp"
#include "moecore/gather_rows.hpp"
#include "moecore/kernels/memory.hpp"
#include "runtime/lent_rows.hpp"
#include "runtime/take_all.hpp"

namespace moecore {
namespace {

constexpr int kWhole = -1;  ///< a phase of all groups
using Lane = Timeline::Lane;

/// [P, F, k] on the device: every rank's routes, padded with the id -1 to F = the most tokens.
struct AllRoutes {
    TensorView ids;
    TensorView weights;  ///< with kFast only; padded with NaN
};

AllRoutes gather_routes(EpResources& resources, const ExpertParallel::Call& call,
                        const Agreement& agreement, Stream stream) {
    Transport& transport = resources.transport;
    const auto& num_tokens = agreement.num_tokens;
    const int64_t most = *std::max_element(num_tokens.begin(), num_tokens.end());
    const int64_t ranks = transport.size(), top_k = call.topk_ids.shape[1];
    const bool with_weights = call.how.combine == CombineMode::kFast;
    const int64_t slots = most * top_k, weights = with_weights ? slots : 0;
    TensorView mine, all, my_weights, all_weights;
    take_all(resources.device_plan.ids, {{&mine, DType::kInt32, slots},
                                         {&all, DType::kInt32, ranks * slots},
                                         {&my_weights, DType::kFloat32, weights},
                                         {&all_weights, DType::kFloat32, ranks * weights}});
    const auto gather = [&](const char* phase, const TensorView& source, const TensorView& own,
                            const TensorView& everyones) {
        const auto bytes_of = [&](int64_t count) {
            return static_cast<size_t>(count) * size_of(source.dtype);
        };
        const int64_t count = source.num_elements();
        const TensorView padding = slice(own, count, own.shape[0] - count);
        cuda::fill(padding.data, 0xff, bytes_of(padding.shape[0]), stream);
        cuda::copy(own.data, source.data, bytes_of(count), stream);
        transport.all_gather_rows(phase, own.data, everyones.data, bytes_of(own.shape[0]), stream);
        return TensorView(everyones.data, source.dtype, {ranks, most, top_k}, transport.device());
    };
    AllRoutes routes{.ids = gather("gather ids", call.topk_ids, mine, all), .weights = {}};
    if (with_weights)
        routes.weights = gather("gather weights", call.topk_weights, my_weights, all_weights);
    return routes;
}

/// One call: the plan, and its phases. Must live until the lane is idle.
class Exchange {
public:
    Exchange(EpResources& resources, const ExpertParallel::Call& call, const Agreement& agreement,
             int num_groups, Stream stream)
        : transport_(resources.transport),
          timeline_(resources.timeline),
          call_(call),
          is_on_host_(transport_.device().type == DeviceType::kCpu),
          is_fast_(call.how.combine == CombineMode::kFast),
          is_direct_(can_lend_rows(transport_, num_groups)),
          places_(agreement.ranges, num_groups),
          plan_(num_groups, transport_.size()),
          row_bytes_(static_cast<size_t>(call.config.hidden_size) * size_of(call.config.dtype)),
          counters_(resources.workspace.counters()) {
        if (agreement.has_routes())
            plan_on_host(resources, agreement, stream);
        else
            plan_on_device(resources, agreement, stream);
        take_scratch(resources.workspace);
    }

    int num_groups() const { return places_.num_groups(); }
    bool is_fast() const { return is_fast_; }
    /// Kernels write rows to other ranks' memory: dispatch_directly(), then finish_results().
    bool is_direct() const { return is_direct_; }

    /// Puts the tokens' copies side by side, in the order in which they are sent. What packs runs
    /// on the stream of the GEMMs: these leave no multiprocessor to another one while they run.
    void pack_tokens(Stream stream) {
        if (is_on_host_) return;
        timeline_.span("pack", kWhole, Lane::kCompute, stream, [&] {
            pack(call_.hidden_states, tensors_.sent_tokens, 0, plan_.sent.total(), packed_, stream);
        });
    }

    /// Sends the copies of tokens that `group` needs first.
    void dispatch(int group, Stream stream) {
        timeline_.span("dispatch", group, Lane::kCommunication, stream, [&] {
            send("dispatch",
                 rows_to_send(call_.hidden_states, tensors_.sent_tokens, packed_,
                              plan_.sent.before(group), plan_.sent.of_group(group)),
                 copies_, plan_.received.before(group), plan_.received.of_group(group), stream);
        });
    }

    /// Writes the copies of tokens, of every group, to where their experts are, and lets results be
    /// written to where their tokens are.
    void dispatch_directly(Stream stream) {
        timeline_.span("dispatch", kWhole, Lane::kCommunication, stream, [&] {
            lend_rows(
                transport_,
                {CrossingRows{plan_.sent, plan_.received, copies_, {}, copy_addresses_},
                 CrossingRows{is_fast_ ? plan_.received : plan_.sent_back,
                              is_fast_ ? plan_.sent : plan_.received_back, back_,
                              is_fast_ ? TensorView() : tensors_.back_rows, result_addresses_}},
                stream);
            scatter_rows(call_.hidden_states, tensors_.sent_tokens, copy_addresses_, stream);
            transport_.finish_writes("dispatch", stream);
        });
    }

    /// Waits for the results that every rank has written.
    void finish_results(Stream stream) {
        timeline_.span("return", kWhole, Lane::kCommunication, stream,
                       [&] { transport_.finish_writes("return", stream); });
    }

    /// Both GEMMs of the experts of `group`: those of other groups have no rows in its offsets.
    /// Then packs its results, or writes them to where they belong.
    void run_experts(int group, Stream stream) {
        timeline_.span("experts", group, Lane::kCompute, stream, [&] {
            const TensorView& offsets = tensors_.group_offsets[static_cast<size_t>(group)];
            const MoEWeights& weights = call_.weights;
            grouped_gemm(copies_, weights.gate_up, weights.gate_up_bias, offsets,
                         tensors_.sorted_slots, call_.config.routing.top_k, call_.config.activation,
                         inner_, stream, counters_);
            if (is_direct_ && !is_fast_)
                return grouped_gemm_to_rows(inner_, weights.down, weights.down_bias, offsets,
                                            call_.config.dtype, result_addresses_, stream,
                                            counters_, Settled::kWeights);
            grouped_gemm(inner_, weights.down, weights.down_bias, offsets, {}, 1, {}, rows_, stream,
                         counters_, Settled::kWeights);
            if (!is_fast_)
                pack(rows_, tensors_.back_rows, plan_.sent_back.before(group),
                     sum(plan_.sent_back.of_group(group)), packed_back_, stream);
        });
    }

    /// Sends every route's result of `group` to the token's owner.
    void send_back(int group, Stream stream) {
        timeline_.span("return", group, Lane::kCommunication, stream, [&] {
            send("return",
                 rows_to_send(rows_, tensors_.back_rows, packed_back_,
                              plan_.sent_back.before(group), plan_.sent_back.of_group(group)),
                 back_, plan_.received_back.before(group), plan_.received_back.of_group(group),
                 stream);
        });
    }

    /// kFast: adds the routes of each copy where its experts are.
    void add_locally(Stream stream) {
        timeline_.span("add locally", kWhole, Lane::kCompute, stream, [&] {
            combine(rows_, tensors_.copy_slot_to_row, tensors_.copy_weights, {}, {}, partial_,
                    stream);
            if (is_direct_) scatter_rows(partial_, {}, result_addresses_, stream);
        });
    }

    /// kFast: sends one row a copy to the token's owner, the way the copies of `group` came.
    void send_back_partial(int group, Stream stream) {
        timeline_.span("return", group, Lane::kCommunication, stream, [&] {
            const TensorView rows = slice(partial_, plan_.received.before(group), 0);
            send("return",
                 {.data = rows.data,
                  .row_stride = row_bytes_,
                  .index = nullptr,
                  .counts = plan_.received.of_group(group)},
                 back_, plan_.sent.before(group), plan_.sent.of_group(group), stream);
        });
    }

    /// Adds every token's results in the order of its choices (kFast: of ranks), and the shared
    /// expert's.
    void combine_results(const TensorView& shared, const TensorView& shared_scale, Stream stream) {
        timeline_.span("combine", kWhole, Lane::kCompute, stream, [&] {
            combine(back_, is_fast_ ? tensors_.slot_to_partial : tensors_.slot_to_back,
                    is_fast_ ? tensors_.ones : call_.topk_weights, shared, shared_scale,
                    call_.output, stream);
        });
    }

private:
    void plan_on_host(EpResources& resources, const Agreement& agreement, Stream stream) {
        const int top_k = call_.config.routing.top_k;
        plan_ = make_dispatch_plan(places_, transport_.rank(), top_k, agreement.ids);
        if (is_fast_) fast_.emplace(plan_, top_k, agreement.weights);
        tensors_ = place_plan(plan_, fast_ ? &*fast_ : nullptr, places_, transport_.rank(),
                              resources.plan_storage, transport_.device(), stream);
    }

    void plan_on_device(EpResources& resources, const Agreement& agreement, Stream stream) {
        const AllRoutes all = gather_routes(resources, call_, agreement, stream);
        plan_ = moecore::plan_on_device(transport_, places_, all.ids, all.weights,
                                        call_.topk_ids.shape[0], resources.device_plan, tensors_,
                                        stream);
    }

    void take_scratch(Workspace& workspace) {
        const DType dtype = call_.config.dtype;
        const int64_t width = call_.config.hidden_size;
        const int64_t num_copies = plan_.received.total();
        const int64_t num_rows = plan_.sent_back.total();
        const int64_t num_sent = plan_.sent.total();
        take_all(
            workspace,
            {{&copies_, dtype, num_copies, width},
             {&inner_, dtype, num_rows, call_.config.intermediate_size},
             {&rows_, dtype, is_direct_ && !is_fast_ ? 0 : num_rows, width},
             {&back_, dtype, is_fast() ? num_sent : plan_.received_back.total(), width},
             {&partial_, dtype, is_fast() ? num_copies : 0, width},
             // A transport of host memory gathers rows by itself.
             {&packed_, dtype, is_on_host_ || is_direct_ ? 0 : num_sent, width},
             {&packed_back_, dtype, is_on_host_ || is_fast() || is_direct_ ? 0 : num_rows, width},
             {&copy_addresses_, DType::kInt64, is_direct_ ? num_sent : 0},
             {&result_addresses_, DType::kInt64,
              is_direct_ ? (is_fast() ? num_copies : num_rows) : 0}});
    }

    static int64_t sum(std::span<const int64_t> counts) {
        return std::accumulate(counts.begin(), counts.end(), int64_t{0});
    }

    /// On a GPU, rows `source[index[i]]` for i = first .. first + count - 1 to the same rows of
    /// `packed`. A transport of host memory gathers by itself.
    void pack(const TensorView& source, const TensorView& index, int64_t first, int64_t count,
              const TensorView& packed, Stream stream) {
        if (is_on_host_) return;
        gather_rows(source, slice(index, first, count), slice(packed, first, count), stream);
    }

    /// Rows `source[index[i]]` for i from `first` on: those in `packed`, if they were packed.
    RowsToSend rows_to_send(const TensorView& source, const TensorView& index,
                            const TensorView& packed, int64_t first,
                            std::span<const int64_t> counts) const {
        if (is_on_host_)
            return {.data = source.data,
                    .row_stride = static_cast<size_t>(source.strides[0]) * size_of(source.dtype),
                    .index = index.as<int32_t>() + first,
                    .counts = counts};
        return {.data = slice(packed, first, 0).data,
                .row_stride = row_bytes_,
                .index = nullptr,
                .counts = counts};
    }

    /// Sends rows; what arrives goes to rows of `target` from first_received on.
    void send(const char* phase, const RowsToSend& rows, const TensorView& target,
              int64_t first_received, std::span<const int64_t> received, Stream stream) {
        const TensorView arrived = slice(target, first_received, 0);
        transport_.all_to_all_v(phase, rows, {.data = arrived.data, .counts = received}, row_bytes_,
                                stream);
    }

    Transport& transport_;
    Timeline& timeline_;
    const ExpertParallel::Call& call_;
    bool is_on_host_, is_fast_, is_direct_;
    ExpertPlaces places_;
    DispatchPlan plan_;
    std::optional<FastReturn> fast_;
    PlanTensors tensors_;
    size_t row_bytes_;
    TensorView counters_;              ///< of the GEMMs
    TensorView copies_;                ///< [copies received, H]
    TensorView inner_, rows_;          ///< [R, I] and [R, H] of this rank's experts
    TensorView back_;                  ///< [results received, H]
    TensorView partial_;               ///< [copies received, H]; kFast
    TensorView packed_, packed_back_;  ///< rows side by side; on CUDA, unless is_direct_
    TensorView copy_addresses_, result_addresses_;  ///< of rows in other ranks' memory; is_direct_
};

/// The shared expert's results.
struct Shared {
    TensorView rows, scale;
};

Shared run_shared(const ExpertParallel::Call& call, Timeline& timeline, Stream stream) {
    Shared shared;
    if (call.config.shared_intermediate_size > 0)
        timeline.span("shared expert", kWhole, Lane::kCompute, stream,
                      [&] { shared.rows = call.run_shared(shared.scale); });
    return shared;
}

/// Where ranks write to each other's memory: results cross as they are made, and groups would have
/// nothing to hide. The shared expert runs under the dispatch.
Shared run_direct(Exchange& exchange, const ExpertParallel::Call& call, Timeline& timeline,
                  CommLane& lane, Stream stream) {
    const int64_t arrived =
        lane.submit([&exchange](Stream s) { exchange.dispatch_directly(s); }, stream);
    const Shared shared = run_shared(call, timeline, stream);
    lane.wait(arrived, stream);
    for (int group = 0; group < exchange.num_groups(); ++group) exchange.run_experts(group, stream);
    if (exchange.is_fast()) exchange.add_locally(stream);
    exchange.finish_results(stream);
    return shared;
}

/// The pipeline: while a group is in its GEMMs the next one arrives and the last one leaves. The
/// shared expert runs under the first dispatch.
Shared run_pipeline(Exchange& exchange, const ExpertParallel::Call& call, Timeline& timeline,
                    CommLane& lane, Stream stream) {
    const int num_groups = exchange.num_groups();
    const auto dispatch = [&](int group) {
        return lane.submit([&exchange, group](Stream s) { exchange.dispatch(group, s); }, stream);
    };
    exchange.pack_tokens(stream);
    int64_t arriving = dispatch(0);
    const Shared shared = run_shared(call, timeline, stream);
    int64_t leaving = 0;
    for (int group = 0; group < num_groups; ++group) {
        const int64_t arrived = arriving;
        if (group + 1 < num_groups) arriving = dispatch(group + 1);
        lane.wait(arrived, stream);
        exchange.run_experts(group, stream);
        if (!exchange.is_fast())
            leaving =
                lane.submit([&exchange, group](Stream s) { exchange.send_back(group, s); }, stream);
    }
    if (exchange.is_fast()) {
        exchange.add_locally(stream);
        for (int group = 0; group < num_groups; ++group)
            leaving = lane.submit(
                [&exchange, group](Stream s) { exchange.send_back_partial(group, s); }, stream);
    }
    lane.wait(leaving, stream);
    return shared;
}

}  // namespace

bool needs_host_routes(const Transport& transport, const Agreement& agreement, int num_groups) {
    return transport.device().type == DeviceType::kCpu ||
           !can_plan_on_device(ExpertPlaces(agreement.ranges, num_groups));
}

void run_all_to_all(EpResources& resources, const ExpertParallel::Call& call,
                    const Agreement& agreement, int num_groups, Stream stream) {
    std::optional<Exchange> exchange;
    resources.timeline.span("plan", kWhole, Lane::kCompute, stream, [&] {
        exchange.emplace(resources, call, agreement, num_groups, stream);
    });
    const bool overlaps =
        (num_groups > 1 && !exchange->is_direct()) || call.config.shared_intermediate_size > 0;
    if (overlaps && resources.side_lane == nullptr)
        resources.side_lane = make_side_lane(resources.transport.device());
    CommLane& lane = overlaps ? *resources.side_lane : *resources.inline_lane;
    try {
        const auto run = exchange->is_direct() ? run_direct : run_pipeline;
        const Shared shared = run(*exchange, call, resources.timeline, lane, stream);
        exchange->combine_results(shared.rows, shared.scale, stream);
    } catch (const std::exception& error) {
        // The lane may still be inside a call that reads `exchange`: end that first.
        resources.transport.abort_because(error);
        try {
            lane.wait(lane.submit([](Stream) {}, stream), stream);
        } catch (const std::exception&) {
            // The lane's own error; the first one is reported.
        }
        throw;
    }
}

}  // namespace moecore
