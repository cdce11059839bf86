#include "moecore/gather_rows.hpp"

#include "moecore/kernels/gather_rows.hpp"
#include "moecore/kernels/memory.hpp"
#include "ops/check.hpp"

namespace moecore {
namespace {

void check_input(const Check& check, const TensorView& input) {
    check.dtype("input", input, {DType::kFloat32, DType::kBFloat16});
    check.shape("input", input, {Check::kAny, Check::kAny});
    check.rows_contiguous("input", input);
    check.that(input.shape[1] >= 1, "input must have at least one column, got ", input);
}

void check_index(const Check& check, const TensorView& index, const TensorView& input) {
    check.dtype("index", index, {DType::kInt32});
    check.shape("index", index, {Check::kAny});
    check.contiguous("index", index);
    check.device("index", index, input.device);
}

/// The part of the args that describes the input.
GatherRowsArgs args_for(const TensorView& input, const TensorView& index, int slots_per_row) {
    const auto element_bytes = static_cast<int64_t>(size_of(input.dtype));
    GatherRowsArgs args{};
    args.input = input.data;
    args.index = index.defined() ? index.as<int32_t>() : nullptr;
    args.num_inputs = input.shape[0];
    args.slots_per_row = slots_per_row;
    args.row_bytes = input.shape[1] * element_bytes;
    args.input_stride = input.strides[0] * element_bytes;
    return args;
}

void run(const Check& check, const GatherRowsArgs& args, Device device, Stream stream) {
    switch (device.type) {
        case DeviceType::kCpu:
            for (int64_t i = 0; args.index != nullptr && i < args.num_outputs; ++i)
                check.that(
                    args.index[i] >= -1 && args.index[i] < args.num_inputs * args.slots_per_row,
                    "index must be in [-1, ", args.num_inputs * args.slots_per_row, "), got ",
                    args.index[i], " at ", i);
            return cpu::gather_rows(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(device.index);
            return cuda::gather_rows(args, stream);
        }
    }
}

}  // namespace

void gather_rows(const TensorView& input, const TensorView& index, const TensorView& output,
                 Stream stream, int slots_per_row) {
    const Check check("gather_rows");
    check.that(slots_per_row >= 1, "slots_per_row must be >= 1, got ", slots_per_row);
    check_input(check, input);
    check_index(check, index, input);
    check.dtype("output", output, {input.dtype});
    check.shape("output", output, {index.shape[0], input.shape[1]});
    check.rows_contiguous("output", output);
    check.device("output", output, input.device);
    check.no_overlap("output", output, "input", input);
    check.no_overlap("output", output, "index", index);

    GatherRowsArgs args = args_for(input, index, slots_per_row);
    args.output = output.data;
    args.output_stride = output.strides[0] * static_cast<int64_t>(size_of(output.dtype));
    args.num_outputs = index.shape[0];
    run(check, args, input.device, stream);
}

void scatter_rows(const TensorView& input, const TensorView& index, const TensorView& addresses,
                  Stream stream) {
    const Check check("scatter_rows");
    check_input(check, input);
    check.dtype("addresses", addresses, {DType::kInt64});
    check.shape("addresses", addresses, {Check::kAny});
    check.contiguous("addresses", addresses);
    check.device("addresses", addresses, input.device);
    if (index.defined()) {
        check_index(check, index, input);
        check.shape("index", index, {addresses.shape[0]});
    } else {
        check.that(addresses.shape[0] <= input.shape[0], "addresses must be at most the ",
                   input.shape[0], " rows of input without index, got ", addresses.shape[0]);
    }

    GatherRowsArgs args = args_for(input, index, 1);
    args.addresses = addresses.as<int64_t>();
    args.num_outputs = addresses.shape[0];
    run(check, args, input.device, stream);
}

}  // namespace moecore
