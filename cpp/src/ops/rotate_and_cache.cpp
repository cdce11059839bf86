#include "moecore/rotate_and_cache.hpp"

#include "moecore/kernels/memory.hpp"
#include "moecore/kernels/rotate_and_cache.hpp"
#include "ops/kv_cache.hpp"
#include "ops/norms.hpp"

namespace moecore {
namespace {

/// `count` heads of every token, from head `first` on.
TensorView some_heads(const TensorView& heads, int64_t first, int64_t count) {
    TensorView view = heads;
    view.shape[1] = count;
    view.data =
        heads.as<char>() + static_cast<size_t>(first * heads.strides[1]) * size_of(heads.dtype);
    return view;
}

}  // namespace

void rotate_and_cache(const TensorView& heads, const TensorView& q_weight,
                      const TensorView& k_weight, float eps, const TensorView& positions,
                      const TensorView& cos_sin, RotaryPairs pairs, const KvCache& cache,
                      const SequenceBatch& batch, Stream stream) {
    constexpr const char* kOp = "rotate_and_cache";
    const Check check(kOp);
    check.shape("heads", heads, {Check::kAny, Check::kAny, Check::kAny});
    check.that(cache.key.rank == 3, "key_cache must have 3 dimensions, got ", to_string(cache.key));
    const int64_t num_key = cache.key.shape[0], num_query = heads.shape[1] - 2 * num_key;
    check.that(num_query >= 0, "heads must be at least ", 2 * num_key,
               ", twice those of the cache, got ", heads.shape[1]);
    const bool has_norm = q_weight.defined();
    check.that(has_norm == k_weight.defined(), "k_weight must come with q_weight, got one of them");
    const TensorView rotated = some_heads(heads, 0, num_query + num_key);

    RotateAndCacheArgs args{
        .heads = {},
        .store =
            checked_write_kv_cache(check, kOp, some_heads(heads, num_query, num_key),
                                   some_heads(heads, num_query + num_key, num_key), cache, batch),
        .has_norm = has_norm,
    };
    if (has_norm)
        args.heads = checked_norm_and_rotate(check, rotated, num_query, q_weight, k_weight, eps,
                                             positions, cos_sin, pairs);
    else
        args.heads.rotary = checked_rotary_embedding(check, rotated, positions, cos_sin, pairs);
    args.heads.query.num_heads = num_query;
    check.no_overlap("key_cache", cache.key, "heads", heads);
    check.no_overlap("value_cache", cache.value, "heads", heads);
    switch (heads.device.type) {
        case DeviceType::kCpu:
            return cpu::rotate_and_cache(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(heads.device.index);
            return cuda::rotate_and_cache(args, stream);
        }
    }
}

}  // namespace moecore
