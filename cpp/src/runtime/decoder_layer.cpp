#include "moecore/decoder_layer.hpp"

#include <cmath>

#include "moecore/norm_and_rotate.hpp"
#include "moecore/rms_norm.hpp"
#include "moecore/rotary_embedding.hpp"
#include "moecore/rotate_and_cache.hpp"
#include "runtime/head_views.hpp"
#include "runtime/weight_rules.hpp"

namespace moecore {
namespace {

const Check kCheck("DecoderLayer");

void check_config(const DecoderConfig& config, bool has_experts) {
    kCheck.that(config.hidden_size >= 1, "hidden_size must be >= 1, got ", config.hidden_size);
    kCheck.that(config.num_kv_heads >= 1, "num_kv_heads must be >= 1, got ", config.num_kv_heads);
    kCheck.that(config.num_heads >= 1 && config.num_heads % config.num_kv_heads == 0,
                "num_heads must be a positive multiple of num_kv_heads, got ", config.num_heads,
                " with num_kv_heads ", config.num_kv_heads);
    kCheck.that(config.head_dim >= 1, "head_dim must be >= 1, got ", config.head_dim);
    kCheck.that(std::isfinite(config.rms_norm_eps) && config.rms_norm_eps >= 0,
                "rms_norm_eps must be finite and >= 0, got ", config.rms_norm_eps);
    kCheck.that(config.dtype == DType::kFloat32 || config.dtype == DType::kBFloat16,
                "dtype must be float32 or bfloat16, got ", name_of(config.dtype));
    if (has_experts)
        kCheck.that(config.intermediate_size == 0, "intermediate_size must be 0 with moe, got ",
                    config.intermediate_size);
    else
        kCheck.that(config.intermediate_size >= 1,
                    "intermediate_size must be >= 1 without moe, got ", config.intermediate_size);
}

void check_qk_norms(const WeightRules& rules, const DecoderConfig& config,
                    const DecoderWeights& weights) {
    if (config.qk_norm == QkNorm::kNone) {
        kCheck.that(!weights.q_norm.defined() && !weights.k_norm.defined(),
                    "qk_norm must be per_head or full_width with q_norm and k_norm, got none");
        return;
    }
    const bool whole = config.qk_norm == QkNorm::kFullWidth;
    rules.vector("q_norm", weights.q_norm, {(whole ? config.num_heads : 1) * config.head_dim});
    rules.vector("k_norm", weights.k_norm, {(whole ? config.num_kv_heads : 1) * config.head_dim});
}

void check_experts(const WeightRules& rules, const DecoderConfig& config,
                   const DecoderWeights& weights) {
    const MoEConfig& moe = weights.moe->config();
    kCheck.that(moe.hidden_size == config.hidden_size, "moe must have hidden_size ",
                config.hidden_size, ", got ", moe.hidden_size);
    kCheck.that(moe.dtype == config.dtype, "moe must have dtype ", name_of(config.dtype), ", got ",
                name_of(moe.dtype));
    kCheck.that(!weights.gate_up.defined() && !weights.down.defined(),
                "gate_up and down must not be given with moe, got one of them");
    rules.matrix("router", weights.router, {moe.num_experts, config.hidden_size}, false);
}

void check_mlp(const WeightRules& rules, const DecoderConfig& config,
               const DecoderWeights& weights) {
    const int64_t width = config.hidden_size, inner = config.intermediate_size;
    kCheck.that(!weights.router.defined(), "router must come with moe, got none");
    rules.matrix("gate_up", weights.gate_up, {2 * inner, width}, true);
    rules.matrix("down", weights.down, {width, inner}, false);
}

/// The same elements, a token's heads as one row.
TensorView as_rows(const TensorView& heads) {
    TensorView view(heads.data, heads.dtype, {heads.shape[0], heads.shape[1] * heads.shape[2]},
                    heads.device);
    view.strides[0] = heads.strides[0];
    return view;
}

}  // namespace

DecoderLayer::DecoderLayer(const DecoderConfig& config, const DecoderWeights& weights)
    : config_(config), weights_(weights), device_(device_of(weights.qkv)) {
    check_config(config, weights.moe != nullptr);
    const int64_t width = config.hidden_size;
    const int64_t q_width = config.num_heads * config.head_dim;
    const int64_t qkv_width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
    const WeightRules rules{kCheck, config.dtype, device_};
    rules.matrix("qkv", weights.qkv, {qkv_width, width}, false);
    rules.optional_vector("qkv_bias", weights.qkv_bias, {qkv_width});
    rules.matrix("output", weights.output, {width, q_width}, false);
    rules.optional_vector("output_bias", weights.output_bias, {width});
    rules.vector("input_norm", weights.input_norm, {width});
    rules.vector("post_norm", weights.post_norm, {width});
    check_qk_norms(rules, config, weights);
    if (weights.moe != nullptr)
        check_experts(rules, config, weights);
    else
        check_mlp(rules, config, weights);
}

size_t DecoderLayer::workspace_bytes(int64_t max_tokens) const {
    return weights_.moe != nullptr ? weights_.moe->workspace_bytes(max_tokens) : 0;
}

void DecoderLayer::check_call(const Activations& activations) const {
    const ActivationTensors& a = activations.tensors();
    const auto fits = [&](const char* name, const TensorView& view, int64_t width) {
        kCheck.that(view.defined(), name, " must be given for this layer, got none");
        if (view.shape[1] != width) kCheck.shape(name, view, {Check::kAny, width});
    };
    kCheck.dtype("residual", a.residual, {config_.dtype});
    kCheck.device("residual", a.residual, device_);
    fits("residual", a.residual, config_.hidden_size);
    fits("qkv", a.qkv, (config_.num_heads + 2 * config_.num_kv_heads) * config_.head_dim);
    fits("attended", a.attended, config_.num_heads * config_.head_dim);
    if (weights_.moe != nullptr)
        fits("router_logits", a.router_logits, weights_.moe->config().num_experts);
    else
        fits("inner", a.inner, config_.intermediate_size);
}

/// One call with the rotation only where both norms store in one dtype, which the operators ask
/// for.
bool DecoderLayer::normalises_heads_alike() const {
    return config_.qk_norm == QkNorm::kPerHead && weights_.q_norm.dtype == weights_.k_norm.dtype;
}

void DecoderLayer::normalise_heads(const ActivationTensors& a, Stream stream) const {
    TensorView query = heads_of(a.qkv, 0, config_.num_heads, config_.head_dim);
    TensorView key = heads_of(a.qkv, config_.num_heads, config_.num_kv_heads, config_.head_dim);
    if (config_.qk_norm == QkNorm::kFullWidth) {
        query = as_rows(query);
        key = as_rows(key);
    }
    rms_norm(query, weights_.q_norm, config_.rms_norm_eps, {}, query, stream);
    rms_norm(key, weights_.k_norm, config_.rms_norm_eps, {}, key, stream);
}

void DecoderLayer::project(const ActivationTensors& a, bool is_first, Stream stream,
                           Settled settled) const {
    rms_norm(is_first ? a.residual : a.delta, weights_.input_norm, config_.rms_norm_eps,
             is_first ? TensorView{} : a.residual, a.normed, stream);
    linear(a.normed, weights_.qkv, weights_.qkv_bias, {}, a.qkv, stream, settled);
}

void DecoderLayer::project_qkv(const Activations& activations, bool is_first, Stream stream) const {
    check_call(activations);
    project(activations.tensors(), is_first, stream, Settled::kNothing);
    if (config_.qk_norm != QkNorm::kNone) normalise_heads(activations.tensors(), stream);
}

void DecoderLayer::before_attention(const Activations& activations, const TensorView& positions,
                                    const TensorView& cos_sin, bool is_first, Stream stream,
                                    Settled settled) const {
    check_call(activations);
    const ActivationTensors& a = activations.tensors();
    project(a, is_first, stream, settled);
    const TensorView rotated =
        heads_of(a.qkv, 0, config_.num_heads + config_.num_kv_heads, config_.head_dim);
    if (normalises_heads_alike()) {
        norm_and_rotate(rotated, config_.num_heads, weights_.q_norm, weights_.k_norm,
                        config_.rms_norm_eps, positions, cos_sin, RotaryPairs::kHalves, stream);
        return;
    }
    if (config_.qk_norm != QkNorm::kNone) normalise_heads(a, stream);
    rotary_embedding(rotated, positions, cos_sin, RotaryPairs::kHalves, stream);
}

void DecoderLayer::before_attention(const Activations& activations, const TensorView& positions,
                                    const TensorView& cos_sin, const KvCache& cache,
                                    const SequenceBatch& sequences, bool is_first, Stream stream,
                                    Settled settled) const {
    check_call(activations);
    const ActivationTensors& a = activations.tensors();
    project(a, is_first, stream, settled);
    const bool alike = normalises_heads_alike();
    if (!alike && config_.qk_norm != QkNorm::kNone) normalise_heads(a, stream);
    rotate_and_cache(
        heads_of(a.qkv, 0, config_.num_heads + 2 * config_.num_kv_heads, config_.head_dim),
        alike ? weights_.q_norm : TensorView{}, alike ? weights_.k_norm : TensorView{},
        config_.rms_norm_eps, positions, cos_sin, RotaryPairs::kHalves, cache, sequences, stream);
}

void DecoderLayer::after_attention(const Activations& activations, Workspace& workspace,
                                   Stream stream, Settled settled) const {
    check_call(activations);
    const ActivationTensors& a = activations.tensors();
    linear(a.attended, weights_.output, weights_.output_bias, {}, a.delta, stream, settled);
    rms_norm(a.delta, weights_.post_norm, config_.rms_norm_eps, a.residual, a.normed, stream);
    if (weights_.moe != nullptr) {
        linear(a.normed, weights_.router, {}, {}, a.router_logits, stream, settled);
        weights_.moe->forward(a.normed, a.router_logits, a.delta, workspace, stream);
    } else {
        linear(a.normed, weights_.gate_up, {}, {.activation = Activation::kSwiglu}, a.inner, stream,
               settled);
        linear(a.inner, weights_.down, {}, {}, a.delta, stream, settled);
    }
}

}  // namespace moecore
