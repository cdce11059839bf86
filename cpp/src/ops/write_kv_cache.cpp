#include "moecore/write_kv_cache.hpp"

#include "moecore/kernels/write_kv_cache.hpp"
#include "ops/check.hpp"
#include "ops/kv_cache.hpp"

namespace moecore {

void write_kv_cache(const TensorView& key, const TensorView& value, const KvCache& cache,
                    const SequenceBatch& batch, Stream) {
    constexpr const char* kOp = "write_kv_cache";
    const Check check(kOp);
    check.shape("key", key, {Check::kAny, Check::kAny, Check::kAny});
    const KvCacheArgs cache_args =
        checked_kv_cache(check, kOp, cache, batch, key.shape[0], key.shape[2]);
    const auto check_rows = [&](const char* name, const TensorView& rows) {
        check.dtype(name, rows, {cache_args.dtype});
        check.shape(name, rows, {key.shape[0], cache_args.num_kv_heads, key.shape[2]});
        check.rows_contiguous(name, rows);
        check.device(name, rows, cache.key.device);
        check.no_overlap("key_cache", cache.key, name, rows);
        check.no_overlap("value_cache", cache.value, name, rows);
    };
    check_rows("key", key);
    check_rows("value", value);
    cpu::write_kv_cache({
        .key = key.data,
        .value = value.data,
        .key_strides = {key.strides[0], key.strides[1]},
        .value_strides = {value.strides[0], value.strides[1]},
        .cache = cache_args,
    });
}

}  // namespace moecore
