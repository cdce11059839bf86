#include "moecore/decoder.hpp"

#include <cmath>

#include "moecore/embedding.hpp"
#include "moecore/paged_attention.hpp"
#include "moecore/rms_norm.hpp"
#include "runtime/head_views.hpp"
#include "runtime/weight_rules.hpp"

namespace moecore {
namespace {

const Check kCheck("Decoder");

void check_layers(const std::vector<const DecoderLayer*>& layers) {
    kCheck.that(!layers.empty(), "layers must hold at least one, got none");
    for (size_t i = 0; i < layers.size(); ++i) {
        kCheck.that(layers[i] != nullptr, "layers must not be null, got null at ", i);
        const DecoderConfig& first = layers[0]->config();
        const DecoderConfig& config = layers[i]->config();
        const auto equal = [&](const char* name, int64_t value, int64_t expected) {
            kCheck.that(value == expected, "layers must have one ", name, ", got ", expected,
                        " at 0 and ", value, " at ", i);
        };
        equal("hidden_size", config.hidden_size, first.hidden_size);
        equal("num_heads", config.num_heads, first.num_heads);
        equal("num_kv_heads", config.num_kv_heads, first.num_kv_heads);
        equal("head_dim", config.head_dim, first.head_dim);
        kCheck.that(config.dtype == first.dtype, "layers must have one dtype, got ",
                    name_of(first.dtype), " at 0 and ", name_of(config.dtype), " at ", i);
    }
}

/// Rows of a GPU are not looked at: the host has not seen them.
void check_logit_rows(const TensorView& rows) {
    kCheck.shape("logit_rows", rows, {Check::kAny});
    kCheck.dtype("logit_rows", rows, {DType::kInt32, DType::kInt64});
    kCheck.contiguous("logit_rows", rows);
    if (rows.device.type != DeviceType::kCpu) return;
    const auto row = [&](int64_t i) {
        return rows.dtype == DType::kInt32 ? rows.as<int32_t>()[i] : rows.as<int64_t>()[i];
    };
    for (int64_t i = 1; i < rows.shape[0]; ++i)
        kCheck.that(row(i - 1) < row(i), "logit_rows must be ascending, got ", row(i - 1), " then ",
                    row(i), " at ", i);
}

void check_caches(const DecoderParts& parts) {
    kCheck.that(parts.caches.size() == parts.layers.size(), "caches must be one a layer, ",
                parts.layers.size(), ", got ", parts.caches.size());
    const DecoderConfig& config = parts.layers[0]->config();
    for (const KvCache& cache : parts.caches) {
        kCheck.shape("caches", cache.key,
                     {config.num_kv_heads, Check::kAny, kKvBlockSize * config.head_dim});
        kCheck.dtype("caches", cache.key, {config.dtype});
    }
}

}  // namespace

Decoder::Decoder(const DecoderParts& parts) : parts_(parts) {
    check_layers(parts.layers);
    check_caches(parts);
    const DecoderConfig& config = parts.layers[0]->config();
    const WeightRules rules{kCheck, config.dtype, device_of(parts.head)};
    const GroupedGemmWeights& head = parts.head;
    const int64_t vocab_size = head.packed ? head.packed->n() : head.plain.shape[0];
    rules.matrix("head", head, {vocab_size, config.hidden_size}, false);
    rules.matrix("embedding", parts.embedding, {vocab_size, config.hidden_size}, false);
    rules.vector("final_norm", parts.final_norm, {config.hidden_size});
}

size_t Decoder::workspace_bytes(int64_t max_tokens) const {
    const DecoderConfig& config = parts_.layers[0]->config();
    size_t most = 3 * Workspace::bytes_for(config.dtype, {max_tokens, config.hidden_size});
    for (const DecoderLayer* layer : parts_.layers)
        most = std::max(most, layer->workspace_bytes(max_tokens));
    return most;
}

void Decoder::forward(const DecoderBatch& batch, const Activations& activations,
                      Workspace& workspace, const TensorView& logits, Stream stream) const {
    check_logit_rows(batch.logit_rows);
    const ActivationTensors& a = activations.tensors();
    const DecoderConfig& config = parts_.layers[0]->config();
    const int64_t dim = config.head_dim;
    const auto scale = static_cast<float>(std::pow(static_cast<double>(dim), -0.5));

    // 1. Embedding, then the layers. It waits for all before it,
    //    and nothing after it writes weights or the batch.
    SequenceBatch sequences = batch.sequences;
    sequences.is_settled = true;
    embedding(batch.token_ids, parts_.embedding, a.residual, stream);
    for (size_t i = 0; i < parts_.layers.size(); ++i) {
        const DecoderLayer& layer = *parts_.layers[i];
        layer.before_attention(activations, batch.positions, batch.cos_sin, parts_.caches[i],
                               sequences, i == 0, stream, Settled::kWeights);
        paged_attention(heads_of(a.qkv, 0, config.num_heads, dim), parts_.caches[i], sequences,
                        scale, heads_of(a.attended, 0, config.num_heads, dim), stream);
        layer.after_attention(activations, workspace, stream, Settled::kWeights);
    }

    // 2. The rows that want logits, which are few of a prompt's.
    const int64_t num_rows = batch.logit_rows.shape[0];
    if (num_rows == activations.num_tokens()) {  // ascending, so all of them
        rms_norm(a.delta, parts_.final_norm, config.rms_norm_eps, a.residual, a.normed, stream);
        return linear(a.normed, parts_.head, {}, {}, logits, stream, Settled::kWeights);
    }
    workspace.reset();
    const TensorView residual = workspace.take(config.dtype, {num_rows, config.hidden_size});
    const TensorView delta = workspace.take(config.dtype, {num_rows, config.hidden_size});
    const TensorView normed = workspace.take(config.dtype, {num_rows, config.hidden_size});
    embedding(batch.logit_rows, a.residual, residual, stream);
    embedding(batch.logit_rows, a.delta, delta, stream);
    rms_norm(delta, parts_.final_norm, config.rms_norm_eps, residual, normed, stream);
    linear(normed, parts_.head, {}, {}, logits, stream, Settled::kWeights);
}

}  // namespace moecore
