#include "ops/kv_cache.hpp"

#include <cstdint>

namespace moecore {
namespace {

constexpr int64_t kCudaHeadDimStep = 16;  ///< the depth of one product of the tensor cores

void check_tensors(const Check& check, const KvCache& cache, const SequenceBatch& batch,
                   int64_t head_dim) {
    check.that(head_dim >= 2 && head_dim % 2 == 0 && head_dim <= kMaxHeadDim,
               "head size must be even and in [2, ", kMaxHeadDim, "], got ", head_dim);
    check.dtype("key_cache", cache.key, {DType::kFloat32, DType::kBFloat16});
    check.shape("key_cache", cache.key, {Check::kAny, Check::kAny, kKvBlockSize * head_dim});
    check.contiguous("key_cache", cache.key);
    check.that(cache.key.shape[0] >= 1, "key_cache must have at least one head, got ", cache.key);
    check.dtype("value_cache", cache.value, {cache.key.dtype});
    check.shape("value_cache", cache.value,
                {cache.key.shape[0], cache.key.shape[1], cache.key.shape[2]});
    check.contiguous("value_cache", cache.value);
    check.device("value_cache", cache.value, cache.key.device);
    check.no_overlap("key_cache", cache.key, "value_cache", cache.value);

    check.dtype("context_lens", batch.context_lens, {DType::kInt32});
    check.shape("context_lens", batch.context_lens, {Check::kAny});
    check.contiguous("context_lens", batch.context_lens);
    const int64_t num_sequences = batch.context_lens.shape[0];
    check.dtype("query_offsets", batch.query_offsets, {DType::kInt32});
    check.shape("query_offsets", batch.query_offsets, {num_sequences + 1});
    check.contiguous("query_offsets", batch.query_offsets);
    check.dtype("block_tables", batch.block_tables, {DType::kInt32});
    check.shape("block_tables", batch.block_tables, {num_sequences, Check::kAny});
    check.rows_contiguous("block_tables", batch.block_tables);
    check.device("context_lens", batch.context_lens, cache.key.device);
    check.device("query_offsets", batch.query_offsets, cache.key.device);
    check.device("block_tables", batch.block_tables, cache.key.device);
}

/// What a sequence says of itself must hold: its tokens, its length, and the blocks that it uses.
void check_sequence(const Check& check, const KvCacheArgs& args, int64_t s, int64_t table_width) {
    const int64_t num_queries = int64_t{args.query_offsets[s + 1]} - args.query_offsets[s];
    check.that(num_queries >= 0, "query_offsets must not decrease, got ", args.query_offsets[s],
               " then ", args.query_offsets[s + 1], " at sequence ", s);
    const int64_t length = args.context_lens[s];
    check.that(length >= num_queries && length <= table_width * kKvBlockSize,
               "context_lens must be in [", num_queries, ", ", table_width * kKvBlockSize,
               "], the tokens of this call and the room of block_tables, got ", length,
               " at sequence ", s);
    if (num_queries == 0) return;
    const int32_t* table = args.block_tables + s * args.block_table_stride;
    for (int64_t b = 0; b * kKvBlockSize < length; ++b)
        check.that(table[b] >= 0 && table[b] < args.num_blocks, "block_tables must be in [0, ",
                   args.num_blocks, "), the blocks of the cache, got ", table[b], " at sequence ",
                   s, ", block ", b);
}

}  // namespace

KvCacheArgs checked_kv_cache(const Check& check, const char* op, const KvCache& cache,
                             const SequenceBatch& batch, int64_t num_tokens, int64_t head_dim) {
    check_tensors(check, cache, batch, head_dim);
    const KvCacheArgs args{
        .key = cache.key.data,
        .value = cache.value.data,
        .num_kv_heads = cache.key.shape[0],
        .num_blocks = cache.key.shape[1],
        .head_dim = head_dim,
        .query_offsets = batch.query_offsets.as<int32_t>(),
        .context_lens = batch.context_lens.as<int32_t>(),
        .block_tables = batch.block_tables.as<int32_t>(),
        .block_table_stride = batch.block_tables.strides[0],
        .block_table_width = batch.block_tables.shape[1],
        .num_sequences = batch.context_lens.shape[0],
        .dtype = cache.key.dtype,
        .is_settled = batch.is_settled,
    };
    if (cache.key.device.type == DeviceType::kCuda) {
        if (args.dtype != DType::kBFloat16 || head_dim % kCudaHeadDimStep != 0)
            throw UnsupportedError(
                concat(op,
                       ": on CUDA the cache must be bfloat16 and the head size a "
                       "multiple of ",
                       kCudaHeadDimStep, ", got ", name_of(args.dtype), " and ", head_dim));
        return args;
    }
    check.that(args.query_offsets[0] == 0 && args.query_offsets[args.num_sequences] == num_tokens,
               "query_offsets must go from 0 to ", num_tokens, ", the number of tokens, got ",
               args.query_offsets[0], " to ", args.query_offsets[args.num_sequences]);
    for (int64_t s = 0; s < args.num_sequences; ++s)
        check_sequence(check, args, s, args.block_table_width);
    return args;
}

void check_head_rows(const Check& check, const char* name, const TensorView& rows) {
    check.rows_contiguous(name, rows);
    if (rows.device.type != DeviceType::kCuda) return;
    constexpr int64_t kAlignment = 16;
    const auto element = static_cast<int64_t>(size_of(rows.dtype));
    check.that(reinterpret_cast<uintptr_t>(rows.data) % kAlignment == 0 &&
                   rows.strides[0] * element % kAlignment == 0 &&
                   rows.strides[1] * element % kAlignment == 0,
               name, " must have its rows at multiples of ", kAlignment, " bytes on CUDA, got ",
               rows);
}

}  // namespace moecore
