#include "moecore/rms_norm.hpp"

#include <cmath>

#include "moecore/kernels/memory.hpp"
#include "ops/head_rows.hpp"
#include "ops/norms.hpp"

namespace moecore {
namespace {

/// `view` must be like input in shape, dtype, device and order.
void check_like_input(const Check& check, const char* name, const TensorView& view,
                      const TensorView& input) {
    check.dtype(name, view, {input.dtype});
    if (input.rank == 2)
        check.shape(name, view, {input.shape[0], input.shape[1]});
    else
        check.shape(name, view, {input.shape[0], input.shape[1], input.shape[2]});
    check.rows_contiguous(name, view);
    check.device(name, view, input.device);
}

}  // namespace

RmsNormArgs checked_rms_norm(const Check& check, const char* input_name, const TensorView& input,
                             const char* weight_name, const TensorView& weight, float eps,
                             const TensorView& residual, const TensorView& output) {
    check.dtype(input_name, input, {DType::kFloat32, DType::kBFloat16});
    check.that(input.rank == 2 || input.rank == 3, input_name, " must have 2 or 3 dimensions, got ",
               input);
    check.rows_contiguous(input_name, input);
    const HeadRows rows = head_rows(input);
    check.that(rows.width >= 1, input_name, " must have at least one column, got ", input);
    check.that(std::isfinite(eps) && eps >= 0, "eps must be finite and >= 0, got ", eps);

    if (weight.dtype != DType::kFloat32) check.dtype(weight_name, weight, {input.dtype});
    check.shape(weight_name, weight, {rows.width});
    check.contiguous(weight_name, weight);
    check.device(weight_name, weight, input.device);

    check_like_input(check, "output", output, input);
    if (!is_same_view(output, input))
        check.no_overlap("output", as_matrix(output), input_name, as_matrix(input));
    check.no_overlap("output", output, weight_name, weight);
    if (residual.defined()) {
        check_like_input(check, "residual", residual, input);
        check.no_overlap("residual", as_matrix(residual), input_name, as_matrix(input));
        check.no_overlap("residual", residual, weight_name, weight);
        check.no_overlap("output", as_matrix(output), "residual", as_matrix(residual));
    }

    const auto strides = [](const TensorView& view) {
        const HeadRows of_view = head_rows(view);
        return HeadStrides{of_view.token_stride, of_view.head_stride};
    };
    return {
        .input = input.data,
        .weight = weight.data,
        .residual = residual.defined() ? residual.data : nullptr,
        .output = output.data,
        .input_strides = strides(input),
        .residual_strides = residual.defined() ? strides(residual) : HeadStrides{},
        .output_strides = strides(output),
        .num_tokens = rows.num_tokens,
        .num_heads = rows.num_heads,
        .width = rows.width,
        .eps = eps,
        .dtype = input.dtype,
        .weight_dtype = weight.dtype,
    };
}

void rms_norm(const TensorView& input, const TensorView& weight, float eps,
              const TensorView& residual, const TensorView& output, Stream stream) {
    const RmsNormArgs args = checked_rms_norm(Check("rms_norm"), "input", input, "weight", weight,
                                              eps, residual, output);
    switch (input.device.type) {
        case DeviceType::kCpu:
            return cpu::rms_norm(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(input.device.index);
            return cuda::rms_norm(args, stream);
        }
    }
}

}  // namespace moecore
