#include "moecore/write_kv_cache.hpp"

#include "moecore/kernels/memory.hpp"
#include "moecore/kernels/write_kv_cache.hpp"
#include "ops/check.hpp"
#include "ops/kv_cache.hpp"

namespace moecore {

WriteKvCacheArgs checked_write_kv_cache(const Check& check, const char* op, const TensorView& key,
                                        const TensorView& value, const KvCache& cache,
                                        const SequenceBatch& batch) {
    check.shape("key", key, {Check::kAny, Check::kAny, Check::kAny});
    const KvCacheArgs cache_args =
        checked_kv_cache(check, op, cache, batch, key.shape[0], key.shape[2]);
    const auto check_rows = [&](const char* name, const TensorView& rows) {
        check.dtype(name, rows, {cache_args.dtype});
        check.shape(name, rows, {key.shape[0], cache_args.num_kv_heads, key.shape[2]});
        check_head_rows(check, name, rows);
        check.device(name, rows, cache.key.device);
        check.no_overlap("key_cache", cache.key, name, rows);
        check.no_overlap("value_cache", cache.value, name, rows);
    };
    check_rows("key", key);
    check_rows("value", value);
    return {
        .key = key.data,
        .value = value.data,
        .key_strides = {key.strides[0], key.strides[1]},
        .value_strides = {value.strides[0], value.strides[1]},
        .num_tokens = key.shape[0],
        .cache = cache_args,
    };
}

void write_kv_cache(const TensorView& key, const TensorView& value, const KvCache& cache,
                    const SequenceBatch& batch, Stream stream) {
    constexpr const char* kOp = "write_kv_cache";
    const WriteKvCacheArgs args = checked_write_kv_cache(Check(kOp), kOp, key, value, cache, batch);
    switch (key.device.type) {
        case DeviceType::kCpu:
            return cpu::write_kv_cache(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(key.device.index);
            return cuda::write_kv_cache(args, stream);
        }
    }
}

}  // namespace moecore
