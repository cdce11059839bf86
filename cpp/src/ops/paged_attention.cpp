#include "moecore/paged_attention.hpp"

#include <cmath>

#include "moecore/kernels/memory.hpp"
#include "moecore/kernels/paged_attention.hpp"
#include "ops/check.hpp"
#include "ops/head_rows.hpp"
#include "ops/kv_cache.hpp"

namespace moecore {

void paged_attention(const TensorView& query, const KvCache& cache, const SequenceBatch& batch,
                     float scale, const TensorView& output, Stream stream) {
    constexpr const char* kOp = "paged_attention";
    const Check check(kOp);
    check.shape("query", query, {Check::kAny, Check::kAny, Check::kAny});
    const KvCacheArgs cache_args =
        checked_kv_cache(check, kOp, cache, batch, query.shape[0], query.shape[2]);
    check.dtype("query", query, {cache_args.dtype});
    check_head_rows(check, "query", query);
    check.device("query", query, cache.key.device);
    const int64_t num_heads = query.shape[1];
    check.that(num_heads >= 1 && num_heads % cache_args.num_kv_heads == 0,
               "query must have a multiple of the cache's ", cache_args.num_kv_heads,
               " heads, got ", num_heads);
    check.that(std::isfinite(scale) && scale > 0, "scale must be finite and > 0, got ", scale);

    check.dtype("output", output, {cache_args.dtype});
    check.shape("output", output, {query.shape[0], num_heads, query.shape[2]});
    check_head_rows(check, "output", output);
    check.device("output", output, cache.key.device);
    check.no_overlap("output", as_matrix(output), "query", as_matrix(query));
    check.no_overlap("output", output, "key_cache", cache.key);
    check.no_overlap("output", output, "value_cache", cache.value);
    check.no_overlap("output", output, "query_offsets", batch.query_offsets);
    check.no_overlap("output", output, "context_lens", batch.context_lens);
    check.no_overlap("output", output, "block_tables", batch.block_tables);

    const PagedAttentionArgs args{
        .query = query.data,
        .output = output.data,
        .query_strides = {query.strides[0], query.strides[1]},
        .output_strides = {output.strides[0], output.strides[1]},
        .num_tokens = query.shape[0],
        .num_heads = num_heads,
        .scale = scale,
        .cache = cache_args,
    };
    switch (query.device.type) {
        case DeviceType::kCpu:
            return cpu::paged_attention(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(query.device.index);
            return cuda::paged_attention(args, stream);
        }
    }
}

}  // namespace moecore
