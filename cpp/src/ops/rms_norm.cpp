#include "moecore/rms_norm.hpp"

#include <cmath>

#include "moecore/kernels/memory.hpp"
#include "moecore/kernels/rms_norm.hpp"
#include "ops/check.hpp"
#include "ops/head_rows.hpp"

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

void rms_norm(const TensorView& input, const TensorView& weight, float eps,
              const TensorView& residual, const TensorView& output, Stream stream) {
    const Check check("rms_norm");
    check.dtype("input", input, {DType::kFloat32, DType::kBFloat16});
    check.that(input.rank == 2 || input.rank == 3, "input must have 2 or 3 dimensions, got ",
               to_string(input));
    check.rows_contiguous("input", input);
    const HeadRows rows = head_rows(input);
    check.that(rows.width >= 1, "input must have at least one column, got ", to_string(input));
    check.that(std::isfinite(eps) && eps >= 0, "eps must be finite and >= 0, got ", eps);

    if (weight.dtype != DType::kFloat32) check.dtype("weight", weight, {input.dtype});
    check.shape("weight", weight, {rows.width});
    check.contiguous("weight", weight);
    check.device("weight", weight, input.device);

    check_like_input(check, "output", output, input);
    if (!is_same_view(output, input))
        check.no_overlap("output", as_matrix(output), "input", as_matrix(input));
    check.no_overlap("output", output, "weight", weight);
    if (residual.defined()) {
        check_like_input(check, "residual", residual, input);
        check.no_overlap("residual", as_matrix(residual), "input", as_matrix(input));
        check.no_overlap("residual", residual, "weight", weight);
        check.no_overlap("output", as_matrix(output), "residual", as_matrix(residual));
    }

    const auto strides = [](const TensorView& view) {
        const HeadRows of_view = head_rows(view);
        return HeadStrides{of_view.token_stride, of_view.head_stride};
    };
    const RmsNormArgs args{
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
