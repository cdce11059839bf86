#include "moecore/grouped_gemm.hpp"

#include <algorithm>
#include <cmath>

#include "moecore/kernels/grouped_gemm.hpp"
#include "moecore/kernels/memory.hpp"
#include "ops/check.hpp"

namespace moecore {
namespace {

/// G, N, K of either kind of weights, and the part of the args that describes them.
struct WeightSizes {
    int64_t num_groups, n, k_dim;
};

/// Checks `weights`, which the caller knows as `name`, and fills the weight fields of `args`.
WeightSizes describe_weights(const Check& check, const char* name,
                             const GroupedGemmWeights& weights, const GroupedGemmConfig& config,
                             DType dtype, Device device, GroupedGemmArgs& args) {
    if (weights.packed != nullptr) {
        const PackedWeights& packed = *weights.packed;
        check.that(packed.dtype() == dtype, name, " must be ", name_of(dtype),
                   " as the input is, got ", name_of(packed.dtype()));
        check.that(packed.device() == device, name, " must be on ", device, ", got ",
                   packed.device());
        check.that(packed.gated() == is_gated(config.activation), name,
                   " must be packed with gated = ", is_gated(config.activation),
                   " for this activation, got gated = ", packed.gated());
        args.weights = packed.data();
        args.is_packed = true;
        args.group_stride = packed.group_stride();
        return {packed.num_groups(), packed.n(), packed.k_dim()};
    }
    const TensorView& plain = weights.plain;
    check.dtype(name, plain, {dtype});
    check.shape(name, plain, {Check::kAny, Check::kAny, Check::kAny});
    check.device(name, plain, device);
    check.matrix_strides(name, plain);
    args.weights = plain.data;
    args.is_packed = false;
    args.group_stride = plain.strides[0];
    args.n_stride = plain.strides[1];
    args.k_stride = plain.strides[2];
    return {plain.shape[0], plain.shape[1], plain.shape[2]};
}

void check_bias(const Check& check, const TensorView& bias, const WeightSizes& sizes,
                const TensorView& input, const TensorView& output, GroupedGemmArgs& args) {
    if (!bias.defined()) return;
    if (input.dtype == DType::kFloat32)
        check.dtype("bias", bias, {DType::kFloat32});
    else
        check.dtype("bias", bias, {DType::kFloat32, input.dtype});
    check.shape("bias", bias, {sizes.num_groups, sizes.n});
    check.rows_contiguous("bias", bias);
    check.device("bias", bias, input.device);
    check.no_overlap("output", output, "bias", bias);
    args.bias = bias.data;
    args.bias_dtype = bias.dtype;
    args.bias_stride = bias.strides[0];
}

/// On the CPU every offset and slot is looked at before any row is.
void check_rows(const Check& check, const TensorView& expert_offsets,
                const TensorView& sorted_slots, int slots_per_token, int64_t num_input_rows,
                int64_t num_output_rows) {
    const int64_t* offsets = expert_offsets.as<int64_t>();
    const int64_t num_groups = expert_offsets.shape[0] - 1;
    check.that(offsets[0] >= 0, "expert_offsets must start at 0 or above, got ", offsets[0]);
    for (int64_t g = 0; g < num_groups; ++g)
        check.that(offsets[g] <= offsets[g + 1], "expert_offsets must not decrease, got ",
                   offsets[g], " then ", offsets[g + 1], " at group ", g);
    const int64_t last = offsets[num_groups];
    check.that(last <= num_output_rows, "expert_offsets must end within the ", num_output_rows,
               " rows of output, got ", last);
    if (!sorted_slots.defined()) {
        check.that(last <= num_input_rows, "expert_offsets must end within the ", num_input_rows,
                   " rows of input, got ", last);
        return;
    }
    check.that(last <= sorted_slots.shape[0], "expert_offsets must end within the ",
               sorted_slots.shape[0], " entries of sorted_slots, got ", last);
    const int64_t num_slots = num_input_rows * slots_per_token;
    for (int64_t row = offsets[0]; row < last; ++row) {
        const int64_t slot = sorted_slots.as<int32_t>()[row];
        check.that(slot >= 0 && slot < num_slots, "sorted_slots must be in [0, ", num_slots,
                   "), input rows times slots_per_token, got ", slot, " at row ", row);
    }
}

void check_config(const Check& check, const GroupedGemmConfig& config) {
    if (config.activation != Activation::kClampedSwiglu) return;
    check.that(std::isfinite(config.alpha), "alpha must be finite, got ", config.alpha);
    check.that(config.limit > 0, "limit must be > 0, got ", config.limit);
    check.that(std::isfinite(config.up_offset), "up_offset must be finite, got ", config.up_offset);
}

void run(const GroupedGemmArgs& args, Device device, Stream stream) {
    switch (device.type) {
        case DeviceType::kCpu:
            return cpu::grouped_gemm(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(device.index);
            return cuda::grouped_gemm(args, stream);
        }
    }
}

/// What grouped_gemm and linear share: everything but the rows.
GroupedGemmArgs build_args(const Check& check, const TensorView& input, const char* weights_name,
                           const GroupedGemmWeights& weights, const GroupedGemmConfig& config,
                           const TensorView& output, WeightSizes& sizes) {
    check.dtype("input", input, {DType::kFloat32, DType::kBFloat16});
    check.shape("input", input, {Check::kAny, Check::kAny});
    check.rows_contiguous("input", input);
    check_config(check, config);

    GroupedGemmArgs args{};
    sizes = describe_weights(check, weights_name, weights, config, input.dtype, input.device, args);
    check.that(sizes.num_groups >= 1 && sizes.n >= 1 && sizes.k_dim >= 1, weights_name,
               " must have no empty dimension, got [", sizes.num_groups, ", ", sizes.n, ", ",
               sizes.k_dim, "]");
    check.shape("input", input, {Check::kAny, sizes.k_dim});
    const bool gated = is_gated(config.activation);
    check.that(!gated || sizes.n % 2 == 0, weights_name,
               " must have an even number of rows for a gated activation, got ", sizes.n);

    check.dtype("output", output, {DType::kFloat32, DType::kBFloat16});
    check.shape("output", output, {Check::kAny, gated ? sizes.n / 2 : sizes.n});
    check.rows_contiguous("output", output);
    check.device("output", output, input.device);
    check.no_overlap("output", output, "input", input);
    if (weights.packed == nullptr) check.no_overlap("output", output, weights_name, weights.plain);

    args.input = input.data;
    args.input_stride = input.strides[0];
    args.num_input_rows = input.shape[0];
    args.slots_per_token = 1;
    args.output = output.data;
    args.output_stride = output.strides[0];
    args.num_rows = output.shape[0];
    args.num_groups = static_cast<int>(sizes.num_groups);
    args.n = sizes.n;
    args.k_dim = sizes.k_dim;
    args.dtype = input.dtype;
    args.output_dtype = output.dtype;
    args.config = config;
    return args;
}

void check_offsets(const Check& check, const TensorView& expert_offsets, const WeightSizes& sizes,
                   const TensorView& output) {
    check.dtype("expert_offsets", expert_offsets, {DType::kInt64});
    check.shape("expert_offsets", expert_offsets, {sizes.num_groups + 1});
    check.contiguous("expert_offsets", expert_offsets);
    check.device("expert_offsets", expert_offsets, output.device);
    check.no_overlap("output", output, "expert_offsets", expert_offsets);
}

void check_counters(const Check& check, const TensorView& work_counters, const TensorView& output,
                    GroupedGemmArgs& args) {
    if (!work_counters.defined()) return;
    check.dtype("work_counters", work_counters, {DType::kInt32});
    check.shape("work_counters", work_counters, {Check::kAny});
    check.that(work_counters.shape[0] >= 2, "work_counters must have 2 elements or more, got ",
               work_counters.shape[0]);
    check.contiguous("work_counters", work_counters);
    check.device("work_counters", work_counters, output.device);
    check.no_overlap("output", output, "work_counters", work_counters);
    args.work_counters = work_counters.as<int32_t>();
}

int64_t expected_of(const Check& check, int64_t expected_rows, int64_t num_rows) {
    check.that(expected_rows >= 0, "expected_rows must be >= 0, got ", expected_rows);
    return expected_rows > 0 ? std::min(expected_rows, num_rows) : num_rows;
}

}  // namespace

void grouped_gemm(const TensorView& input, const GroupedGemmWeights& weights,
                  const TensorView& bias, const TensorView& expert_offsets,
                  const TensorView& sorted_slots, int slots_per_token,
                  const GroupedGemmConfig& config, const TensorView& output, Stream stream,
                  const TensorView& work_counters, Settled settled, int64_t expected_rows) {
    const Check check("grouped_gemm");
    WeightSizes sizes{};
    GroupedGemmArgs args = build_args(check, input, "weights", weights, config, output, sizes);
    check_bias(check, bias, sizes, input, output, args);
    check_offsets(check, expert_offsets, sizes, output);
    check.that(slots_per_token >= 1, "slots_per_token must be >= 1, got ", slots_per_token);
    if (sorted_slots.defined()) {
        check.dtype("sorted_slots", sorted_slots, {DType::kInt32});
        check.shape("sorted_slots", sorted_slots, {Check::kAny});
        check.contiguous("sorted_slots", sorted_slots);
        check.device("sorted_slots", sorted_slots, input.device);
        check.no_overlap("output", output, "sorted_slots", sorted_slots);
        args.sorted_slots = sorted_slots.as<int32_t>();
        args.slots_per_token = slots_per_token;
    }
    check_counters(check, work_counters, output, args);
    if (input.device.type == DeviceType::kCpu)
        check_rows(check, expert_offsets, sorted_slots, slots_per_token, input.shape[0],
                   output.shape[0]);
    args.expert_offsets = expert_offsets.as<int64_t>();
    args.num_rows =
        std::min(args.num_rows, sorted_slots.defined() ? sorted_slots.shape[0] : input.shape[0]);
    args.expected_rows = expected_of(check, expected_rows, args.num_rows);
    args.settled = settled;
    run(args, input.device, stream);
}

void grouped_gemm_to_rows(const TensorView& input, const GroupedGemmWeights& weights,
                          const TensorView& bias, const TensorView& expert_offsets, DType dtype,
                          const TensorView& row_addresses, Stream stream,
                          const TensorView& work_counters, Settled settled, int64_t expected_rows) {
    const Check check("grouped_gemm_to_rows");
    check.dtype("row_addresses", row_addresses, {DType::kInt64});
    check.shape("row_addresses", row_addresses, {Check::kAny});
    check.contiguous("row_addresses", row_addresses);
    check.device("row_addresses", row_addresses, input.device);
    const int64_t width = weights.packed != nullptr ? weights.packed->n() : weights.plain.shape[1];
    const TensorView output(nullptr, dtype, {row_addresses.shape[0], width}, input.device);
    WeightSizes sizes{};
    GroupedGemmArgs args = build_args(check, input, "weights", weights, {}, output, sizes);
    check_bias(check, bias, sizes, input, output, args);
    check_offsets(check, expert_offsets, sizes, output);
    check_counters(check, work_counters, output, args);
    if (input.device.type == DeviceType::kCpu)
        check_rows(check, expert_offsets, {}, 1, input.shape[0], row_addresses.shape[0]);
    args.expert_offsets = expert_offsets.as<int64_t>();
    args.num_rows = std::min(args.num_rows, input.shape[0]);
    args.expected_rows = expected_of(check, expected_rows, args.num_rows);
    args.row_addresses = row_addresses.as<int64_t>();
    args.settled = settled;
    run(args, input.device, stream);
}

void linear(const TensorView& input, const GroupedGemmWeights& weight, const TensorView& bias,
            const GroupedGemmConfig& config, const TensorView& output, Stream stream,
            Settled settled) {
    const Check check("linear");
    // One matrix [N, K] is a group of one.
    const auto with_group = [&](const char* name, const TensorView& view, int rank) {
        if (!view.defined()) return view;
        check.that(view.rank == rank, name, " must have ", rank, " dimensions, got ", view);
        TensorView grouped = view;
        grouped.rank = rank + 1;
        grouped.shape[0] = 1;
        grouped.strides[0] = view.num_elements();
        for (int i = 0; i < rank; ++i) {
            grouped.shape[i + 1] = view.shape[i];
            grouped.strides[i + 1] = view.strides[i];
        }
        return grouped;
    };
    GroupedGemmWeights weights = weight;
    if (weight.packed == nullptr) weights.plain = with_group("weight", weight.plain, 2);

    WeightSizes sizes{};
    GroupedGemmArgs args = build_args(check, input, "weight", weights, config, output, sizes);
    check.that(sizes.num_groups == 1, "weight must hold one group, got ", sizes.num_groups);
    check_bias(check, with_group("bias", bias, 1), sizes, input, output, args);
    check.shape("output", output, {input.shape[0], output.shape[1]});
    args.expected_rows = args.num_rows;
    args.settled = settled;
    run(args, input.device, stream);
}

}  // namespace moecore
