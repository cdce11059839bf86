#include "moecore/combine.hpp"

#include "moecore/kernels/combine.hpp"
#include "moecore/kernels/memory.hpp"
#include "ops/check.hpp"

namespace moecore {

void combine(const TensorView& expert_rows, const TensorView& slot_to_row,
             const TensorView& topk_weights, const TensorView& shared_output,
             const TensorView& shared_scale, const TensorView& output, Stream stream) {
    const Check check("combine");
    const Device device = output.device;
    check.dtype("output", output, {DType::kFloat32, DType::kBFloat16});
    check.shape("output", output, {Check::kAny, Check::kAny});
    check.rows_contiguous("output", output);
    const int64_t num_tokens = output.shape[0];
    const int64_t hidden_size = output.shape[1];
    check.that(hidden_size >= 1, "output must have at least one column, got ", output);

    check.dtype("expert_rows", expert_rows, {DType::kFloat32, DType::kBFloat16});
    check.shape("expert_rows", expert_rows, {Check::kAny, hidden_size});
    check.rows_contiguous("expert_rows", expert_rows);
    check.device("expert_rows", expert_rows, device);
    check.no_overlap("output", output, "expert_rows", expert_rows);

    check.dtype("topk_weights", topk_weights, {DType::kFloat32});
    check.shape("topk_weights", topk_weights, {num_tokens, Check::kAny});
    check.contiguous("topk_weights", topk_weights);
    check.device("topk_weights", topk_weights, device);
    check.no_overlap("output", output, "topk_weights", topk_weights);
    const int64_t num_slots = topk_weights.num_elements();

    check.dtype("slot_to_row", slot_to_row, {DType::kInt32});
    check.shape("slot_to_row", slot_to_row, {num_slots});
    check.contiguous("slot_to_row", slot_to_row);
    check.device("slot_to_row", slot_to_row, device);
    check.no_overlap("output", output, "slot_to_row", slot_to_row);
    if (device.type == DeviceType::kCpu) {
        const int64_t num_rows = expert_rows.shape[0];
        for (int64_t slot = 0; slot < num_slots; ++slot) {
            const int64_t row = slot_to_row.as<int32_t>()[slot];
            check.that(row >= -1 && row < num_rows, "slot_to_row must be in [-1, ", num_rows,
                       "), the rows of expert_rows, got ", row, " at slot ", slot);
        }
    }

    if (shared_output.defined()) {
        check.dtype("shared_output", shared_output, {expert_rows.dtype});
        check.shape("shared_output", shared_output, {num_tokens, hidden_size});
        check.rows_contiguous("shared_output", shared_output);
        check.device("shared_output", shared_output, device);
        const bool in_place = shared_output.data == output.data &&
                              shared_output.dtype == output.dtype &&
                              shared_output.strides == output.strides;
        if (!in_place) check.no_overlap("output", output, "shared_output", shared_output);
    }
    if (shared_scale.defined()) {
        check.that(shared_output.defined(), "shared_scale must come with shared_output, got none");
        check.dtype("shared_scale", shared_scale, {DType::kFloat32});
        check.shape("shared_scale", shared_scale, {num_tokens});
        check.contiguous("shared_scale", shared_scale);
        check.device("shared_scale", shared_scale, device);
        check.no_overlap("output", output, "shared_scale", shared_scale);
    }

    const CombineArgs args{
        .expert_rows = expert_rows.data,
        .slot_to_row = slot_to_row.as<int32_t>(),
        .topk_weights = topk_weights.as<float>(),
        .shared_output = shared_output.defined() ? shared_output.data : nullptr,
        .shared_scale = shared_scale.defined() ? shared_scale.as<float>() : nullptr,
        .output = output.data,
        .num_rows = expert_rows.shape[0],
        .num_tokens = num_tokens,
        .hidden_size = hidden_size,
        .rows_stride = expert_rows.strides[0],
        .shared_stride = shared_output.defined() ? shared_output.strides[0] : 0,
        .output_stride = output.strides[0],
        .top_k = static_cast<int>(topk_weights.shape[1]),
        .rows_dtype = expert_rows.dtype,
        .output_dtype = output.dtype,
    };
    switch (device.type) {
        case DeviceType::kCpu:
            return cpu::combine(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(device.index);
            return cuda::combine(args, stream);
        }
    }
}

}  // namespace moecore
