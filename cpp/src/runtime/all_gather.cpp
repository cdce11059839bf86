#include "runtime/all_gather.hpp"

#include <cstring>

#include "moecore/combine.hpp"
#include "moecore/error.hpp"
#include "moecore/gather_rows.hpp"
#include "moecore/kernels/memory.hpp"
#include "moecore/locate_results.hpp"
#include "moecore/sort_by_expert.hpp"
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

/// The tensors of a call. S = F * k slots a rank, P ranks.
struct Tensors {
    TensorView ids, tokens;                ///< [F, k], [F, H]: this rank's, padded
    TensorView all_ids, all_tokens;        ///< [P * F, k], [P * F, H]
    TensorView sorted_slots, slot_to_row;  ///< [P * S]
    TensorView expert_offsets;             ///< [E_local + 1]
    TensorView inner, rows;                ///< [P * S, I], [P * S, H]
    TensorView results, back;              ///< [P * S, H] to send, and received
    TensorView slot_to_back;               ///< [S]

    Tensors(const MoEConfig& config, int64_t tokens_each, int64_t ranks, Workspace& workspace) {
        const int64_t top_k = config.routing.top_k;
        const int64_t all_slots = ranks * tokens_each * top_k;
        take_all(workspace, {{&ids, DType::kInt32, tokens_each, top_k},
                             {&tokens, config.dtype, tokens_each, config.hidden_size},
                             {&all_ids, DType::kInt32, ranks * tokens_each, top_k},
                             {&all_tokens, config.dtype, ranks * tokens_each, config.hidden_size},
                             {&sorted_slots, DType::kInt32, all_slots},
                             {&slot_to_row, DType::kInt32, all_slots},
                             {&expert_offsets, DType::kInt64, config.num_local_experts + 1},
                             {&inner, config.dtype, all_slots, config.intermediate_size},
                             {&rows, config.dtype, all_slots, config.hidden_size},
                             {&results, config.dtype, all_slots, config.hidden_size},
                             {&back, config.dtype, all_slots, config.hidden_size},
                             {&slot_to_back, DType::kInt32, tokens_each * top_k}});
    }
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

std::unique_ptr<FixedShape> make_shape(const MoEConfig& config, int64_t fixed_tokens,
                                       const std::vector<ExpertRange>& ranges, Device device) {
    std::vector<int32_t> first;
    for (const ExpertRange& range : ranges) first.push_back(range.first);
    first.push_back(config.num_experts);
    const size_t bytes = first.size() * sizeof(int32_t);
    auto shape = std::make_unique<FixedShape>(
        FixedShape{config, fixed_tokens, Buffer(device, bytes), Workspace(device, 0)});
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
    Transport& transport = resources.transport;
    Timeline& timeline = resources.timeline;
    const MoEConfig& config = call.config;
    const Device device = transport.device();
    const int64_t ranks = transport.size();
    const int64_t slots_each = tokens_per_rank * config.routing.top_k;
    const Tensors t(config, tokens_per_rank, ranks, shape.workspace);

    timeline.span("gather tokens", kWhole, Lane::kCommunication, stream, [&] {
        // Slots of padding have the id -1, which no rank owns.
        if (device.type == DeviceType::kCuda)
            cuda::fill(t.ids.data, 0xff, bytes_of(t.ids), stream);
        else
            std::memset(t.ids.data, 0xff, bytes_of(t.ids));
        copy_rows(call.topk_ids, t.ids, stream);
        copy_rows(call.hidden_states, t.tokens, stream);
        transport.all_gather_rows("gather ids", t.ids.data, t.all_ids.data, bytes_of(t.ids),
                                  stream);
        transport.all_gather_rows("gather tokens", t.tokens.data, t.all_tokens.data,
                                  bytes_of(t.tokens), stream);
    });
    timeline.span("experts", kWhole, Lane::kCompute, stream, [&] {
        sort_by_expert(t.all_ids, config.first_expert, t.sorted_slots, t.slot_to_row,
                       t.expert_offsets, stream);
        grouped_gemm(t.all_tokens, call.weights.gate_up, call.weights.gate_up_bias,
                     t.expert_offsets, t.sorted_slots, config.routing.top_k, config.activation,
                     t.inner, stream, shape.workspace.counters());
        grouped_gemm(t.inner, call.weights.down, call.weights.down_bias, t.expert_offsets, {}, 1,
                     {}, t.rows, stream, shape.workspace.counters(), Settled::kWeights);
    });
    timeline.span("return", kWhole, Lane::kCommunication, stream, [&] {
        gather_rows(t.rows, t.slot_to_row, t.results, stream);
        const std::vector<int64_t> counts(static_cast<size_t>(ranks), slots_each);
        transport.all_to_all_v("return", {.data = t.results.data, .counts = counts},
                               {.data = t.back.data, .counts = counts},
                               static_cast<size_t>(config.hidden_size) * size_of(config.dtype),
                               stream);
    });
    TensorView shared_scale;
    const TensorView shared = call.run_shared(shared_scale);
    timeline.span("combine", kWhole, Lane::kCompute, stream, [&] {
        const TensorView first_experts(shape.first_experts.data(), DType::kInt32, {ranks + 1},
                                       device);
        locate_results(t.ids, first_experts, t.slot_to_back, stream);
        combine(t.back, slice(t.slot_to_back, 0, call.topk_ids.num_elements()), call.topk_weights,
                shared, shared_scale, call.output, stream);
    });
}

}  // namespace moecore
