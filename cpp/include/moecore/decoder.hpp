#pragma once

#include <cstddef>
#include <vector>

#include "moecore/decoder_layer.hpp"
#include "moecore/kv_cache.hpp"

namespace moecore {

/// A decoder's parts, borrowed: they must outlive it. V is the size of the vocabulary.
struct DecoderParts {
    GroupedGemmWeights embedding;             ///< [V, H]
    std::vector<const DecoderLayer*> layers;  ///< at least one; equal but for their weights
    std::vector<KvCache> caches;              ///< one a layer, of the layers' heads and dtype
    TensorView final_norm;                    ///< [H]
    GroupedGemmWeights head;                  ///< [V, H]; may be the embedding
};

/// One pass of T tokens over several sequences, of which N rows want logits.
struct DecoderBatch {
    TensorView token_ids;  ///< [T] int32 or int64
    TensorView positions;  ///< [T] int32, each token's place in its sequence
    TensorView cos_sin;    ///< [P, rotary_dim] float32, of every position
    SequenceBatch sequences;
    TensorView logit_rows;  ///< [N] int32 or int64: tokens in [0, T), ascending, none twice
};

/// Token ids to logits: embedding, the layers with paged_attention between their halves, final norm
/// and head. One call a pass, because weights stream through every cache at each step, so that
/// whatever a caller does between layers runs cold. A row's bits depend on its own sequence only.
/// Immutable after construction and thread-safe for calls that share nothing they write.
class Decoder {
public:
    /// Throws InvalidArgument if parts do not fit each other; the message names the part.
    explicit Decoder(const DecoderParts& parts);

    /// Bytes that forward takes of its workspace for up to `max_tokens` tokens.
    size_t workspace_bytes(int64_t max_tokens) const;

    /// Writes the tokens' keys and values into the caches, and logits [N, V] float32.
    /// Takes from `workspace` and resets it. Throws as the operators do.
    void forward(const DecoderBatch& batch, const Activations& activations, Workspace& workspace,
                 const TensorView& logits, Stream stream = {}) const;

private:
    DecoderParts parts_;
};

}  // namespace moecore
