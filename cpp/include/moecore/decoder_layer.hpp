#pragma once

#include <cstddef>
#include <cstdint>

#include "moecore/activations.hpp"
#include "moecore/grouped_gemm.hpp"
#include "moecore/kv_cache.hpp"
#include "moecore/moe_layer.hpp"
#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"
#include "moecore/workspace.hpp"

namespace moecore {

/// What of query and key is normalised before it turns.
enum class QkNorm : uint8_t {
    kNone,
    kPerHead,    ///< each head by itself              (Qwen3)
    kFullWidth,  ///< all heads of a token as one row  (OLMoE)
};

/// The sizes and the mathematics of one decoder layer.
struct DecoderConfig {
    int64_t hidden_size = 0;        ///< H
    int64_t num_heads = 0;          ///< Hq, a multiple of Hk
    int64_t num_kv_heads = 0;       ///< Hk
    int64_t head_dim = 0;           ///< D
    int64_t intermediate_size = 0;  ///< I of the dense MLP; 0 in a layer with experts
    float rms_norm_eps = 0.0f;
    QkNorm qk_norm = QkNorm::kNone;
    DType dtype = DType::kBFloat16;  ///< of weights and activations
};

/// A layer's weights, borrowed: they must outlive the layer. Norms and biases are float32 or of
/// config.dtype.
struct DecoderWeights {
    TensorView input_norm;      ///< [H]
    TensorView post_norm;       ///< [H]
    GroupedGemmWeights qkv;     ///< [(Hq + 2 Hk) D, H]: rows of query, key, value
    TensorView qkv_bias;        ///< [(Hq + 2 Hk) D], or absent
    GroupedGemmWeights output;  ///< [H, Hq D]
    TensorView output_bias;     ///< [H], or absent
    TensorView q_norm, k_norm;  ///< [D] per head, [Hq D] and [Hk D] at full width, or absent
    GroupedGemmWeights router;  ///< [E, H]; with moe
    const MoELayer* moe = nullptr;
    GroupedGemmWeights gate_up;  ///< [2 I, H]: the dense MLP, SwiGLU; without moe
    GroupedGemmWeights down;     ///< [H, I]; without moe
};

/// One pre-norm decoder layer around an attention that the caller computes:
///
///     before_attention   residual += delta, which is what the layer before left there
///                        qkv       = linear(rms_norm(residual)), query and key normalised, rotated
///     the caller         attended  = attention(qkv)
///     after_attention    residual += linear(attended)
///                        delta     = experts or MLP of rms_norm(residual)
///
/// by the operators of the same names, so a row's bits depend on that row only. Immutable after
/// construction and thread-safe for calls that share neither activations nor workspace.
class DecoderLayer {
public:
    /// Throws InvalidArgument if the shape, dtype or strides of a weight do not fit `config`, or it
    /// is on another device than qkv; the message names it.
    DecoderLayer(const DecoderConfig& config, const DecoderWeights& weights);

    /// Bytes that after_attention takes of its workspace for up to `max_tokens` tokens.
    size_t workspace_bytes(int64_t max_tokens) const;

    /// The first half. `is_first`: residual holds the embedding, and delta nothing yet.
    /// positions [T] int32, cos_sin [P, rotary_dim] float32: as rotary_embedding (kHalves) takes
    /// them. `settled`: kWeights if this layer's are.
    void before_attention(const Activations& activations, const TensorView& positions,
                          const TensorView& cos_sin, bool is_first, Stream stream = {},
                          Settled settled = Settled::kNothing) const;

    /// before_attention that also stores keys and values in `cache`, as rotate_and_cache does: what
    /// qkv holds of keys afterwards is not defined.
    void before_attention(const Activations& activations, const TensorView& positions,
                          const TensorView& cos_sin, const KvCache& cache,
                          const SequenceBatch& sequences, bool is_first, Stream stream,
                          Settled settled) const;

    /// before_attention without its last step, for models that change qkv before it turns.
    void project_qkv(const Activations& activations, bool is_first, Stream stream = {}) const;

    /// The second half. Takes from `workspace` and resets it.
    void after_attention(const Activations& activations, Workspace& workspace, Stream stream = {},
                         Settled settled = Settled::kNothing) const;

    const DecoderConfig& config() const { return config_; }

private:
    void check_call(const Activations& activations) const;
    void project(const ActivationTensors& tensors, bool is_first, Stream stream,
                 Settled settled) const;
    bool normalises_heads_alike() const;
    void normalise_heads(const ActivationTensors& tensors, Stream stream) const;

    DecoderConfig config_;
    DecoderWeights weights_;
    Device device_;
};

}  // namespace moecore
