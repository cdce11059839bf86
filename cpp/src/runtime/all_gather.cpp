#include "runtime/all_gather.hpp"

#include <algorithm>
#include <cstring>

#include "moecore/combine.hpp"
#include "moecore/error.hpp"
#include "moecore/gather_rows.hpp"
#include "moecore/kernels/memory.hpp"
#include "moecore/locate_results.hpp"
#include "moecore/sort_by_expert.hpp"
#include "runtime/lent_rows.hpp"
#include "runtime/take_all.hpp"

namespace moecore {
namespace {

constexpr int kWhole = -1;
using Lane = Timeline::Lane;

size_t bytes_of(const TensorView& view) {
    return static_cast<size_t>(view.num_elements()) * size_of(view.dtype);
}

void copy_bytes(void* target, const void* source, size_t bytes, Device device, Stream stream) {
    if (device.type == DeviceType::kCuda)
        cuda::copy(target, source, bytes, stream);
    else if (bytes > 0)
        std::memcpy(target, source, bytes);
}

/// [F, N] with the rows of `source` [T, N] first; the other rows keep what they held.
void copy_rows(const TensorView& source, const TensorView& target, Stream stream) {
    const size_t row_bytes = static_cast<size_t>(source.shape[1]) * size_of(source.dtype);
    const size_t stride = static_cast<size_t>(source.strides[0]) * size_of(source.dtype);
    if (stride == row_bytes || source.shape[0] <= 1)
        return copy_bytes(target.data, source.data,
                          static_cast<size_t>(source.shape[0]) * row_bytes, source.device, stream);
    for (int64_t row = 0; row < source.shape[0]; ++row)
        copy_bytes(target.as<char>() + static_cast<size_t>(row) * row_bytes,
                   source.as<char>() + static_cast<size_t>(row) * stride, row_bytes, source.device,
                   stream);
}

/// The tensors of a call. S = F * k slots a rank, P ranks. Direct: rows are written to where they
/// belong, and need no memory on the way.
struct Tensors {
    TensorView ids, tokens;                ///< [F, k], [F, H]: this rank's, padded; not direct
    TensorView all_ids, all_tokens;        ///< [P * F, k], [P * F, H]
    TensorView sorted_slots, slot_to_row;  ///< [P * S]
    TensorView expert_offsets;             ///< [E_local + 1]
    TensorView inner;                      ///< [P * S, I]
    TensorView rows, results;              ///< [P * S, H] as made, and as sent; not direct
    TensorView back;                       ///< [P * S, H] as received; direct: [S, H]
    TensorView slot_to_back;               ///< [S]
    TensorView addresses;                  ///< [P * S] of each row; direct

    Tensors(const MoEConfig& config, int64_t tokens_each, int64_t ranks, bool is_direct,
            Workspace& workspace) {
        const int64_t top_k = config.routing.top_k, width = config.hidden_size;
        const int64_t slots = tokens_each * top_k, all_slots = ranks * slots;
        const int64_t staged_tokens = is_direct ? 0 : tokens_each;
        const int64_t staged_slots = is_direct ? 0 : all_slots;
        take_all(workspace, {{&ids, DType::kInt32, staged_tokens, top_k},
                             {&tokens, config.dtype, staged_tokens, width},
                             {&all_ids, DType::kInt32, ranks * tokens_each, top_k},
                             {&all_tokens, config.dtype, ranks * tokens_each, width},
                             {&sorted_slots, DType::kInt32, all_slots},
                             {&slot_to_row, DType::kInt32, all_slots},
                             {&expert_offsets, DType::kInt64, config.num_local_experts + 1},
                             {&inner, config.dtype, all_slots, config.intermediate_size},
                             {&rows, config.dtype, staged_slots, width},
                             {&results, config.dtype, staged_slots, width},
                             {&back, config.dtype, is_direct ? slots : all_slots, width},
                             {&slot_to_back, DType::kInt32, slots},
                             {&addresses, DType::kInt64, is_direct ? all_slots : 0}});
    }
};

/// One call of the layer.
class Gathering {
public:
    Gathering(EpResources& resources, const ExpertParallel::Call& call, FixedShape& shape,
              int64_t tokens_per_rank, Stream stream)
        : transport_(resources.transport),
          timeline_(resources.timeline),
          call_(call),
          shape_(shape),
          ranks_(transport_.size()),
          tokens_each_(tokens_per_rank),
          is_direct_(can_lend_rows(transport_, 1)),
          stream_(stream),
          t_(call.config, tokens_per_rank, ranks_, is_direct_, shape.workspace) {}

    void run() {
        timeline_.span("gather tokens", kWhole, Lane::kCommunication, stream_,
                       [&] { is_direct_ ? share_tokens() : gather_tokens(); });
        timeline_.span("experts", kWhole, Lane::kCompute, stream_, [&] { run_experts(); });
        timeline_.span("return", kWhole, Lane::kCommunication, stream_, [&] {
            is_direct_ ? transport_.finish_writes("return", stream_) : send_back();
        });
        TensorView shared_scale;
        const TensorView shared = call_.run_shared(shared_scale);
        timeline_.span("combine", kWhole, Lane::kCompute, stream_,
                       [&] { combine_results(shared, shared_scale); });
    }

private:
    void share_tokens() {
        const auto of_ranks = [&](const TensorView& view) {
            return TensorView(view.data, view.dtype, {ranks_, tokens_each_, view.shape[1]},
                              view.device);
        };
        // Memory of a fixed shape never moves. What a rank shares and returns now, it writes after
        // all have shared, or returned, what was before it: nobody reads that any more.
        if (!shape_.places || shape_.fixed_tokens == 0 || !transport_.loans_last())
            shape_.places =
                lend_shared(transport_, "gather tokens",
                            {of_ranks(t_.all_ids), of_ranks(t_.all_tokens)}, t_.back, stream_);
        // Slots of padding have the id -1, which no rank owns.
        share_rows(transport_,
                   {SharedRows{call_.topk_ids, true}, SharedRows{call_.hidden_states, false}},
                   *shape_.places, stream_);
        transport_.finish_writes("gather tokens", stream_);
    }

    void gather_tokens() {
        if (t_.ids.device.type == DeviceType::kCuda)
            cuda::fill(t_.ids.data, 0xff, bytes_of(t_.ids), stream_);
        else
            std::memset(t_.ids.data, 0xff, bytes_of(t_.ids));
        copy_rows(call_.topk_ids, t_.ids, stream_);
        copy_rows(call_.hidden_states, t_.tokens, stream_);
        transport_.all_gather_rows("gather ids", t_.ids.data, t_.all_ids.data, bytes_of(t_.ids),
                                   stream_);
        transport_.all_gather_rows("gather tokens", t_.tokens.data, t_.all_tokens.data,
                                   bytes_of(t_.tokens), stream_);
    }

    void run_experts() {
        const MoEConfig& config = call_.config;
        const MoEWeights& weights = call_.weights;
        const TensorView counters = shape_.workspace.counters();
        // This rank's share of all routes, if they are spread evenly.
        const int64_t expected = std::max<int64_t>(
            1, t_.sorted_slots.shape[0] * config.num_local_experts / config.num_experts);
        sort_by_expert(t_.all_ids, config.first_expert, t_.sorted_slots, t_.slot_to_row,
                       t_.expert_offsets, stream_);
        if (is_direct_) address_results(*shape_.places, t_.sorted_slots, t_.addresses, stream_);
        grouped_gemm(t_.all_tokens, weights.gate_up, weights.gate_up_bias, t_.expert_offsets,
                     t_.sorted_slots, config.routing.top_k, config.activation, t_.inner, stream_,
                     counters, Settled::kNothing, expected);
        if (is_direct_)
            grouped_gemm_to_rows(t_.inner, weights.down, weights.down_bias, t_.expert_offsets,
                                 config.dtype, t_.addresses, stream_, counters, Settled::kWeights,
                                 expected);
        else
            grouped_gemm(t_.inner, weights.down, weights.down_bias, t_.expert_offsets, {}, 1, {},
                         t_.rows, stream_, counters, Settled::kWeights, expected);
    }

    void send_back() {
        gather_rows(t_.rows, t_.slot_to_row, t_.results, stream_);
        const std::vector<int64_t> counts(static_cast<size_t>(ranks_),
                                          tokens_each_ * call_.config.routing.top_k);
        transport_.all_to_all_v("return", {.data = t_.results.data, .counts = counts},
                                {.data = t_.back.data, .counts = counts},
                                bytes_of(slice(t_.back, 0, 1)), stream_);
    }

    void combine_results(const TensorView& shared, const TensorView& shared_scale) {
        const int64_t num_slots = call_.topk_ids.num_elements();
        const TensorView slot_to_back = slice(t_.slot_to_back, 0, num_slots);
        if (is_direct_)  // a slot's result is in its own row, whoever has written it
            locate_results(call_.topk_ids, shape_.all_experts(), slot_to_back, stream_);
        else
            locate_results(t_.ids, shape_.owners(), t_.slot_to_back, stream_);
        combine(t_.back, slot_to_back, call_.topk_weights, shared, shared_scale, call_.output,
                stream_);
    }

    Transport& transport_;
    Timeline& timeline_;
    const ExpertParallel::Call& call_;
    FixedShape& shape_;
    int64_t ranks_, tokens_each_;
    bool is_direct_;
    Stream stream_;
    Tensors t_;
};

}  // namespace

FixedShape* find_shape(const std::vector<std::unique_ptr<FixedShape>>& known,
                       const MoEConfig& config, int64_t fixed_tokens) {
    for (const auto& shape : known)
        if (shape->fixed_tokens == fixed_tokens &&
            shape->config.hidden_size == config.hidden_size &&
            shape->config.intermediate_size == config.intermediate_size &&
            shape->config.num_experts == config.num_experts &&
            shape->config.first_expert == config.first_expert &&
            shape->config.num_local_experts == config.num_local_experts &&
            shape->config.routing.top_k == config.routing.top_k &&
            shape->config.dtype == config.dtype)
            return shape.get();
    return nullptr;
}

TensorView FixedShape::all_experts() const {
    return TensorView(first_experts.data(), DType::kInt32, {2}, first_experts.device());
}

TensorView FixedShape::owners() const {
    const auto count = static_cast<int64_t>(first_experts.size_bytes() / sizeof(int32_t));
    return TensorView(static_cast<int32_t*>(first_experts.data()) + 2, DType::kInt32, {count - 2},
                      first_experts.device());
}

std::unique_ptr<FixedShape> make_shape(const MoEConfig& config, int64_t fixed_tokens,
                                       const std::vector<ExpertRange>& ranges, Device device) {
    std::vector<int32_t> first = {0, config.num_experts};
    for (const ExpertRange& range : ranges) first.push_back(range.first);
    first.push_back(config.num_experts);
    const size_t bytes = first.size() * sizeof(int32_t);
    auto shape = std::make_unique<FixedShape>(
        FixedShape{config, fixed_tokens, Buffer(device, bytes), Workspace(device, 0), {}});
    if (device.type == DeviceType::kCuda) {
        const cuda::DeviceScope scope(device.index);
        cuda::PinnedBuffer staging;
        std::memcpy(staging.reserve(bytes), first.data(), bytes);
        cuda::copy(shape->first_experts.data(), staging.reserve(bytes), bytes, {});
        cuda::Event copied(device.index);
        copied.record({});
        while (!copied.is_done()) {
        }
    } else {
        std::memcpy(shape->first_experts.data(), first.data(), bytes);
    }
    return shape;
}

void run_all_gather(EpResources& resources, const ExpertParallel::Call& call, FixedShape& shape,
                    int64_t tokens_per_rank, Stream stream) {
    Gathering(resources, call, shape, tokens_per_rank, stream).run();
}

}  // namespace moecore
