#include <pybind11/stl.h>

#include <vector>

#include "bindings/ops.hpp"
#include "moecore/draw_tokens.hpp"
#include "moecore/embedding.hpp"
#include "moecore/paged_attention.hpp"
#include "moecore/rms_norm.hpp"
#include "moecore/rotary_embedding.hpp"
#include "moecore/rotate_and_cache.hpp"
#include "moecore/write_kv_cache.hpp"

namespace py = pybind11;

namespace moecore::bindings {
namespace {

/// The arguments that write_kv_cache and paged_attention share.
class CacheArgs {
public:
    CacheArgs(const char* op, py::handle key_cache, py::handle value_cache,
              py::handle query_offsets, py::handle context_lens, py::handle block_tables)
        : key_(key_cache, op, "key_cache"),
          value_(value_cache, op, "value_cache"),
          offsets_(query_offsets, op, "query_offsets"),
          lens_(context_lens, op, "context_lens"),
          tables_(block_tables, op, "block_tables") {}

    KvCache cache() const { return {key_, value_}; }
    SequenceBatch batch(bool is_settled = false) const {
        return {offsets_, lens_, tables_, is_settled};
    }

private:
    TensorArg key_, value_, offsets_, lens_, tables_;
};

/// What a Decoder calls instead of several operators; not in moecore.ops.
void bind_rotate_and_cache(py::module_& module) {
    module.def("rotate_and_cache",
               [](py::handle heads, py::handle q_weight, py::handle k_weight, float eps,
                  py::handle positions, py::handle cos_sin, bool interleaved, py::handle key_cache,
                  py::handle value_cache, py::handle query_offsets, py::handle context_lens,
                  py::handle block_tables, bool is_settled) {
                   constexpr const char* kOp = "rotate_and_cache";
                   const TensorArg rows(heads, kOp, "heads");
                   const TensorArg q(q_weight, kOp, "q_weight", true);
                   const TensorArg k(k_weight, kOp, "k_weight", true);
                   const TensorArg ids(positions, kOp, "positions");
                   const TensorArg table(cos_sin, kOp, "cos_sin");
                   const CacheArgs cache(kOp, key_cache, value_cache, query_offsets, context_lens,
                                         block_tables);
                   py::gil_scoped_release release;
                   rotate_and_cache(rows, q, k, eps, ids, table,
                                    interleaved ? RotaryPairs::kInterleaved : RotaryPairs::kHalves,
                                    cache.cache(), cache.batch(is_settled), rows.current_stream());
               });
}

}  // namespace

void bind_decoder_ops(py::module_& module) {
    bind_rotate_and_cache(module);
    module.def("rms_norm", [](py::handle input, py::handle weight, float eps, py::handle residual,
                              py::handle output) {
        constexpr const char* kOp = "rms_norm";
        const TensorArg x(input, kOp, "input");
        const TensorArg w(weight, kOp, "weight");
        const TensorArg res(residual, kOp, "residual", true);
        const TensorArg out(output, kOp, "output");
        py::gil_scoped_release release;
        rms_norm(x, w, eps, res, out, x.current_stream());
    });

    module.def("rotary_embedding",
               [](py::handle x, py::handle positions, py::handle cos_sin, bool interleaved) {
                   constexpr const char* kOp = "rotary_embedding";
                   const TensorArg rows(x, kOp, "x");
                   const TensorArg ids(positions, kOp, "positions");
                   const TensorArg table(cos_sin, kOp, "cos_sin");
                   py::gil_scoped_release release;
                   rotary_embedding(rows, ids, table,
                                    interleaved ? RotaryPairs::kInterleaved : RotaryPairs::kHalves,
                                    rows.current_stream());
               });

    module.attr("KV_BLOCK_SIZE") = kKvBlockSize;
    module.def("write_kv_cache",
               [](py::handle key, py::handle value, py::handle key_cache, py::handle value_cache,
                  py::handle query_offsets, py::handle context_lens, py::handle block_tables) {
                   constexpr const char* kOp = "write_kv_cache";
                   const TensorArg k(key, kOp, "key");
                   const TensorArg v(value, kOp, "value");
                   const CacheArgs cache(kOp, key_cache, value_cache, query_offsets, context_lens,
                                         block_tables);
                   py::gil_scoped_release release;
                   write_kv_cache(k, v, cache.cache(), cache.batch(), k.current_stream());
               });

    module.def("paged_attention", [](py::handle query, py::handle key_cache, py::handle value_cache,
                                     py::handle query_offsets, py::handle context_lens,
                                     py::handle block_tables, float scale, py::handle output) {
        constexpr const char* kOp = "paged_attention";
        const TensorArg q(query, kOp, "query");
        const CacheArgs cache(kOp, key_cache, value_cache, query_offsets, context_lens,
                              block_tables);
        const TensorArg out(output, kOp, "output");
        py::gil_scoped_release release;
        paged_attention(q, cache.cache(), cache.batch(), scale, out, q.current_stream());
    });

    module.def("draw_tokens",
               [](py::handle logits, const std::vector<float>& temperature,
                  const std::vector<float>& min_p, const std::vector<double>& noise) {
                   constexpr const char* kOp = "draw_tokens";
                   const TensorArg rows(logits, kOp, "logits");
                   if (min_p.size() != temperature.size() || noise.size() != temperature.size())
                       throw InvalidArgument(
                           concat(kOp, ": temperature, min_p and noise must be as many, got ",
                                  temperature.size(), ", ", min_p.size(), ", ", noise.size()));
                   std::vector<DrawParams> params;
                   for (size_t n = 0; n < temperature.size(); ++n)
                       params.push_back({temperature[n], min_p[n], noise[n]});
                   std::vector<DrawnToken> tokens(params.size());
                   {
                       py::gil_scoped_release release;
                       draw_tokens(rows, params, tokens, rows.current_stream());
                   }
                   py::list token_ids, maxima;
                   for (const DrawnToken& token : tokens) {
                       token_ids.append(token.token_id);
                       maxima.append(token.maximum);
                   }
                   return py::make_tuple(token_ids, maxima);
               });

    module.def("embedding", [](py::handle ids, py::handle weight, py::handle output) {
        constexpr const char* kOp = "embedding";
        const TensorArg rows(ids, kOp, "ids");
        const WeightsArg w(weight, kOp, "weight");
        const TensorArg out(output, kOp, "output");
        py::gil_scoped_release release;
        embedding(rows, w.weights(), out, rows.current_stream());
    });
}

}  // namespace moecore::bindings
