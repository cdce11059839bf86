#include "moecore/rotary_embedding.hpp"

#include "moecore/kernels/memory.hpp"
#include "ops/norms.hpp"

namespace moecore {

RotaryEmbeddingArgs checked_rotary_embedding(const Check& check, const TensorView& x,
                                             const TensorView& positions, const TensorView& cos_sin,
                                             RotaryPairs pairs) {
    check.dtype("x", x, {DType::kFloat32, DType::kBFloat16});
    check.shape("x", x, {Check::kAny, Check::kAny, Check::kAny});
    check.rows_contiguous("x", x);

    check.dtype("cos_sin", cos_sin, {DType::kFloat32});
    check.shape("cos_sin", cos_sin, {Check::kAny, Check::kAny});
    check.rows_contiguous("cos_sin", cos_sin);
    check.device("cos_sin", cos_sin, x.device);
    const int64_t num_positions = cos_sin.shape[0];
    const int64_t rotary_dim = cos_sin.shape[1];
    check.that(rotary_dim >= 2 && rotary_dim % 2 == 0 && rotary_dim <= x.shape[2],
               "cos_sin must have an even number of columns in [2, ", x.shape[2],
               "], the head size of x, got ", rotary_dim);

    check.dtype("positions", positions, {DType::kInt32});
    check.shape("positions", positions, {x.shape[0]});
    check.contiguous("positions", positions);
    check.device("positions", positions, x.device);
    check.no_overlap("x", x, "positions", positions);
    check.no_overlap("x", x, "cos_sin", cos_sin);
    if (x.device.type == DeviceType::kCpu) {
        for (int64_t t = 0; t < x.shape[0]; ++t) {
            const int64_t position = positions.as<int32_t>()[t];
            check.that(position >= 0 && position < num_positions, "positions must be in [0, ",
                       num_positions, "), the rows of cos_sin, got ", position, " at token ", t);
        }
    }

    return {
        .x = x.data,
        .positions = positions.as<int32_t>(),
        .cos_sin = cos_sin.as<float>(),
        .token_stride = x.strides[0],
        .head_stride = x.strides[1],
        .cos_sin_stride = cos_sin.strides[0],
        .num_tokens = x.shape[0],
        .num_heads = x.shape[1],
        .num_positions = num_positions,
        .rotary_dim = rotary_dim,
        .pairs = pairs,
        .dtype = x.dtype,
    };
}

void rotary_embedding(const TensorView& x, const TensorView& positions, const TensorView& cos_sin,
                      RotaryPairs pairs, Stream stream) {
    const RotaryEmbeddingArgs args =
        checked_rotary_embedding(Check("rotary_embedding"), x, positions, cos_sin, pairs);
    switch (x.device.type) {
        case DeviceType::kCpu:
            return cpu::rotary_embedding(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(x.device.index);
            return cuda::rotary_embedding(args, stream);
        }
    }
}

}  // namespace moecore
