#include "moecore/norm_and_rotate.hpp"

#include "moecore/kernels/memory.hpp"
#include "moecore/kernels/norm_and_rotate.hpp"
#include "ops/norms.hpp"

namespace moecore {

NormAndRotateArgs checked_norm_and_rotate(const Check& check, const TensorView& heads,
                                          int64_t num_query_heads, const TensorView& q_weight,
                                          const TensorView& k_weight, float eps,
                                          const TensorView& positions, const TensorView& cos_sin,
                                          RotaryPairs pairs) {
    check.shape("heads", heads, {Check::kAny, Check::kAny, Check::kAny});
    check.that(num_query_heads >= 0 && num_query_heads <= heads.shape[1],
               "num_query_heads must be in [0, ", heads.shape[1], "], the heads, got ",
               num_query_heads);
    TensorView query = heads, key = heads;
    query.shape[1] = num_query_heads;
    key.shape[1] = heads.shape[1] - num_query_heads;
    key.data = heads.as<char>() +
               static_cast<size_t>(num_query_heads * heads.strides[1]) * size_of(heads.dtype);
    const NormAndRotateArgs args{
        .query = checked_rms_norm(check, "heads", query, "q_weight", q_weight, eps, {}, query),
        .key = checked_rms_norm(check, "heads", key, "k_weight", k_weight, eps, {}, key),
        .rotary = checked_rotary_embedding(check, heads, positions, cos_sin, pairs),
    };
    check.dtype("k_weight", k_weight, {q_weight.dtype});
    return args;
}

void norm_and_rotate(const TensorView& heads, int64_t num_query_heads, const TensorView& q_weight,
                     const TensorView& k_weight, float eps, const TensorView& positions,
                     const TensorView& cos_sin, RotaryPairs pairs, Stream stream) {
    const NormAndRotateArgs args =
        checked_norm_and_rotate(Check("norm_and_rotate"), heads, num_query_heads, q_weight,
                                k_weight, eps, positions, cos_sin, pairs);
    switch (heads.device.type) {
        case DeviceType::kCpu:
            return cpu::norm_and_rotate(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(heads.device.index);
            return cuda::norm_and_rotate(args, stream);
        }
    }
}

}  // namespace moecore
