#include "moecore/gather_rows.hpp"

#include "moecore/kernels/gather_rows.hpp"
#include "moecore/kernels/memory.hpp"
#include "ops/check.hpp"

namespace moecore {

void gather_rows(const TensorView& input, const TensorView& index, const TensorView& output,
                 Stream stream, int slots_per_row) {
    const Check check("gather_rows");
    check.that(slots_per_row >= 1, "slots_per_row must be >= 1, got ", slots_per_row);
    check.dtype("input", input, {DType::kFloat32, DType::kBFloat16});
    check.shape("input", input, {Check::kAny, Check::kAny});
    check.rows_contiguous("input", input);
    check.that(input.shape[1] >= 1, "input must have at least one column, got ", input);
    check.dtype("index", index, {DType::kInt32});
    check.shape("index", index, {Check::kAny});
    check.contiguous("index", index);
    check.device("index", index, input.device);
    check.dtype("output", output, {input.dtype});
    check.shape("output", output, {index.shape[0], input.shape[1]});
    check.rows_contiguous("output", output);
    check.device("output", output, input.device);
    check.no_overlap("output", output, "input", input);
    check.no_overlap("output", output, "index", index);

    const auto element_bytes = static_cast<int64_t>(size_of(input.dtype));
    const GatherRowsArgs args{
        .input = input.data,
        .index = index.as<int32_t>(),
        .output = output.data,
        .num_inputs = input.shape[0],
        .num_outputs = index.shape[0],
        .slots_per_row = slots_per_row,
        .row_bytes = input.shape[1] * element_bytes,
        .input_stride = input.strides[0] * element_bytes,
        .output_stride = output.strides[0] * element_bytes,
    };
    switch (input.device.type) {
        case DeviceType::kCpu:
            for (int64_t i = 0; i < args.num_outputs; ++i)
                check.that(args.index[i] >= -1 && args.index[i] < args.num_inputs * slots_per_row,
                           "index must be in [-1, ", args.num_inputs * slots_per_row, "), got ",
                           args.index[i], " at ", i);
            return cpu::gather_rows(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(input.device.index);
            return cuda::gather_rows(args, stream);
        }
    }
}

}  // namespace moecore
