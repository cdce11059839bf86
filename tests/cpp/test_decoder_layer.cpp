#include "moecore/decoder_layer.hpp"

#include <functional>
#include <memory>

#include "moecore/rms_norm.hpp"
#include "moecore/rotary_embedding.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

constexpr int64_t kHidden = 66, kHeads = 4, kKvHeads = 2, kDim = 6, kInner = 35, kExperts = 5;
constexpr int64_t kQkv = (kHeads + 2 * kKvHeads) * kDim, kPositions = 9;
constexpr float kLayerEps = 1e-5f;

/// Weights of a layer, with experts or dense.
struct Layer {
    Layer(DType dtype, QkNorm qk_norm, bool is_moe) {
        Random random(7);
        const auto make = [&](int64_t count) { return random.array(dtype, count, 0.3); };
        const auto vector = [&](int64_t count) { return keep(make(count)).view({count}); };
        const auto matrix = [&](int64_t n, int64_t k) { return keep(make(n * k)).view({n, k}); };
        config = {.hidden_size = kHidden,
                  .num_heads = kHeads,
                  .num_kv_heads = kKvHeads,
                  .head_dim = kDim,
                  .intermediate_size = is_moe ? 0 : kInner,
                  .rms_norm_eps = kLayerEps,
                  .qk_norm = qk_norm,
                  .dtype = dtype};
        weights.input_norm = vector(kHidden);
        weights.post_norm = vector(kHidden);
        weights.qkv = matrix(kQkv, kHidden);
        weights.qkv_bias = vector(kQkv);
        weights.output = matrix(kHidden, kHeads * kDim);
        weights.output_bias = vector(kHidden);
        if (qk_norm != QkNorm::kNone) {
            const bool whole = qk_norm == QkNorm::kFullWidth;
            weights.q_norm = vector(whole ? kHeads * kDim : kDim);
            weights.k_norm = vector(whole ? kKvHeads * kDim : kDim);
        }
        if (is_moe) {
            const MoEConfig moe_config{.hidden_size = kHidden,
                                       .intermediate_size = kInner,
                                       .num_experts = kExperts,
                                       .num_local_experts = kExperts,
                                       .routing = {.top_k = 2},
                                       .activation = {.activation = Activation::kSwiglu},
                                       .dtype = dtype};
            MoEWeights experts;
            experts.gate_up =
                keep(make(kExperts * 2 * kInner * kHidden)).view({kExperts, 2 * kInner, kHidden});
            experts.down =
                keep(make(kExperts * kHidden * kInner)).view({kExperts, kHidden, kInner});
            moe = std::make_unique<MoELayer>(moe_config, experts);
            weights.moe = moe.get();
            weights.router = matrix(kExperts, kHidden);
        } else {
            weights.gate_up = matrix(2 * kInner, kHidden);
            weights.down = matrix(kHidden, kInner);
        }
    }

    Array& keep(Array array) {
        arrays.push_back(std::make_unique<Array>(std::move(array)));
        return *arrays.back();
    }

    DecoderConfig config;
    DecoderWeights weights;
    std::unique_ptr<MoELayer> moe;
    std::vector<std::unique_ptr<Array>> arrays;
};

/// Activations of T tokens, the same numbers for every object.
struct Buffers {
    Buffers(DType dtype, int64_t num_tokens) {
        Random random(3);
        const auto make = [&](int64_t width) {
            arrays.push_back(std::make_unique<Array>(random.array(dtype, num_tokens * width)));
            return arrays.back()->view({num_tokens, width});
        };
        tensors = {.residual = make(kHidden),
                   .normed = make(kHidden),
                   .delta = make(kHidden),
                   .qkv = make(kQkv),
                   .attended = make(kHeads * kDim),
                   .router_logits = make(kExperts),
                   .inner = make(kInner)};
    }

    void expect_equal(const Buffers& other, const std::string& what) const {
        for (size_t i = 0; i < arrays.size(); ++i)
            expect(arrays[i]->bytes() == other.arrays[i]->bytes(),
                   concat("tensor ", i, ", ", what));
    }

    ActivationTensors tensors;
    std::vector<std::unique_ptr<Array>> arrays;
};

TensorView heads_of(const TensorView& qkv, int64_t first, int64_t count) {
    TensorView view(qkv.as<char>() + static_cast<size_t>(first * kDim) * size_of(qkv.dtype),
                    qkv.dtype, {qkv.shape[0], count, kDim});
    view.strides[0] = kQkv;
    return view;
}

TensorView columns_of(const TensorView& qkv, int64_t first, int64_t count) {
    TensorView view = heads_of(qkv, first, count);
    view.rank = 2;
    view.shape[1] = count * kDim;
    view.strides[1] = 1;
    return view;
}

/// The layer's halves, operator by operator.
void run_ops(const Layer& layer, const ActivationTensors& a, const TensorView& positions,
             const TensorView& cos_sin, bool is_first, Workspace& workspace) {
    const DecoderWeights& w = layer.weights;
    if (is_first)
        rms_norm(a.residual, w.input_norm, kLayerEps, {}, a.normed);
    else
        rms_norm(a.delta, w.input_norm, kLayerEps, a.residual, a.normed);
    linear(a.normed, w.qkv, w.qkv_bias, {}, a.qkv);
    if (layer.config.qk_norm != QkNorm::kNone) {
        const auto part = layer.config.qk_norm == QkNorm::kPerHead ? heads_of : columns_of;
        const TensorView query = part(a.qkv, 0, kHeads), key = part(a.qkv, kHeads, kKvHeads);
        rms_norm(query, w.q_norm, kLayerEps, {}, query);
        rms_norm(key, w.k_norm, kLayerEps, {}, key);
    }
    rotary_embedding(heads_of(a.qkv, 0, kHeads + kKvHeads), positions, cos_sin,
                     RotaryPairs::kHalves);
    linear(a.attended, w.output, w.output_bias, {}, a.delta);
    rms_norm(a.delta, w.post_norm, kLayerEps, a.residual, a.normed);
    if (w.moe != nullptr) {
        linear(a.normed, w.router, {}, {}, a.router_logits);
        w.moe->forward(a.normed, a.router_logits, a.delta, workspace);
    } else {
        linear(a.normed, w.gate_up, {}, {.activation = Activation::kSwiglu}, a.inner);
        linear(a.inner, w.down, {}, {}, a.delta);
    }
}

void test_halves_give_the_bits_of_the_ops_one_by_one() {
    Array table = Random(5).array(kF32, kPositions * kDim);
    const TensorView cos_sin = table.view({kPositions, kDim});
    for (const DType dtype : {kF32, kBf16})
        for (const QkNorm qk_norm : {QkNorm::kNone, QkNorm::kPerHead, QkNorm::kFullWidth})
            for (const bool is_moe : {true, false})
                for (const bool is_first : {true, false})
                    for (const int64_t num_tokens : {0, 1, 7}) {
                        const Layer made(dtype, qk_norm, is_moe);
                        const DecoderLayer layer(made.config, made.weights);
                        std::vector<int64_t> ids;
                        for (int64_t t = 0; t < num_tokens; ++t) ids.push_back(t + 2);
                        Array numbers = int_array(DType::kInt32, ids);
                        const TensorView positions = numbers.view({num_tokens});
                        Workspace workspace({}, layer.workspace_bytes(num_tokens));
                        Buffers got(dtype, num_tokens), wanted(dtype, num_tokens);
                        const Activations activations(got.tensors);
                        layer.before_attention(activations, positions, cos_sin, is_first);
                        layer.after_attention(activations, workspace);
                        run_ops(made, wanted.tensors, positions, cos_sin, is_first, workspace);
                        got.expect_equal(wanted, concat("qk_norm ", static_cast<int>(qk_norm),
                                                        " moe ", is_moe, " first ", is_first));
                    }
}

void test_project_qkv_leaves_out_the_rotation_alone() {
    const Layer made(kF32, QkNorm::kPerHead, true);
    const DecoderLayer layer(made.config, made.weights);
    Array table = Random(5).array(kF32, kPositions * kDim);
    Array ids = int_array(DType::kInt32, {4, 8});
    const TensorView positions = ids.view({2}), cos_sin = table.view({kPositions, kDim});
    Buffers got(kF32, 2), wanted(kF32, 2);
    layer.project_qkv(Activations(got.tensors), false);
    rotary_embedding(heads_of(got.tensors.qkv, 0, kHeads + kKvHeads), positions, cos_sin,
                     RotaryPairs::kHalves);
    layer.before_attention(Activations(wanted.tensors), positions, cos_sin, false);
    got.expect_equal(wanted, "project_qkv and rotation");
}

void test_decoder_layer_names_the_bad_argument() {
    const auto bad =
        [&](bool is_moe, const std::function<void(DecoderConfig&, DecoderWeights&)>& change,
            const char* text, std::source_location where = std::source_location::current()) {
            Layer made(kBf16, QkNorm::kPerHead, is_moe);
            change(made.config, made.weights);
            expect_invalid([&] { DecoderLayer(made.config, made.weights); },
                           std::string("DecoderLayer: ") + text, where);
        };
    Array other(kBf16, 200);
    bad(true, [](auto& c, auto&) { c.hidden_size = 0; }, "hidden_size must");
    bad(true, [](auto& c, auto&) { c.num_heads = 3; }, "num_heads must");
    bad(true, [](auto& c, auto&) { c.num_kv_heads = 0; }, "num_kv_heads must");
    bad(true, [](auto& c, auto&) { c.head_dim = 0; }, "head_dim must");
    bad(true, [](auto& c, auto&) { c.rms_norm_eps = -1; }, "rms_norm_eps must");
    bad(true, [](auto& c, auto&) { c.dtype = DType::kInt32; }, "dtype must");
    bad(true, [](auto& c, auto&) { c.dtype = kF32; }, "qkv must be float32");
    bad(true, [](auto& c, auto&) { c.intermediate_size = 4; }, "intermediate_size must be 0");
    bad(false, [](auto& c, auto&) { c.intermediate_size = 0; }, "intermediate_size must be >= 1");
    bad(true, [](auto& c, auto&) { c.qk_norm = QkNorm::kNone; }, "qk_norm must");
    bad(true, [](auto& c, auto&) { c.qk_norm = QkNorm::kFullWidth; }, "q_norm must");
    bad(true, [](auto&, auto& w) { w.k_norm = {}; }, "k_norm must be given");
    bad(true, [](auto&, auto& w) { w.input_norm = {}; }, "input_norm must be given");
    bad(true, [](auto&, auto& w) { w.post_norm.shape[0] = 3; }, "post_norm must");
    bad(true, [](auto&, auto& w) { w.qkv = {}; }, "qkv must be given");
    bad(true, [](auto&, auto& w) { w.qkv.plain.shape[0] = 5; }, "qkv must");
    bad(true, [](auto&, auto& w) { w.qkv_bias.shape[0] = 5; }, "qkv_bias must");
    bad(true, [](auto&, auto& w) { w.output.plain.shape[1] = 5; }, "output must");
    bad(true, [](auto&, auto& w) { w.output_bias.device = kOtherDevice; }, "output_bias must");
    bad(true, [](auto&, auto& w) { w.router = {}; }, "router must be given");
    bad(true, [&](auto&, auto& w) { w.down = other.view({10, 20}); }, "gate_up and down must");
    bad(false, [&](auto&, auto& w) { w.router = other.view({10, 20}); }, "router must come");
    bad(false, [](auto&, auto& w) { w.gate_up = {}; }, "gate_up must be given");
    bad(false, [](auto&, auto& w) { w.down.plain.shape[1] = 5; }, "down must");
}

void test_activations_name_the_bad_tensor() {
    Buffers good(kBf16, 3);
    const auto bad = [&](const std::function<void(ActivationTensors&)>& change, const char* text,
                         std::source_location where = std::source_location::current()) {
        ActivationTensors tensors = good.tensors;
        change(tensors);
        expect_invalid([&] { Activations{tensors}; }, std::string("Activations: ") + text, where);
    };
    bad([](auto& a) { a.residual = {}; }, "residual must");
    bad([](auto& a) { a.residual.dtype = DType::kInt64; }, "residual must");
    bad([](auto& a) { a.normed.shape[1] = 5; }, "normed must");
    bad([](auto& a) { a.delta = {}; }, "delta must");
    bad([](auto& a) { a.qkv.shape[0] = 2; }, "qkv must");
    bad([](auto& a) { a.attended.dtype = kF32; }, "attended must");
    bad([](auto& a) { a.router_logits.dtype = DType::kInt32; }, "router_logits must");
    bad([](auto& a) { a.inner.strides[0] = 1; }, "inner must");
    bad([](auto& a) { a.inner.device = kOtherDevice; }, "inner must");
    bad([](auto& a) { a.delta.data = a.residual.data; }, "delta must not overlap residual");
    bad([](auto& a) { a.inner.data = a.qkv.data; }, "inner must not overlap qkv");
}

void test_calls_name_the_activations_that_do_not_fit() {
    const Layer made(kBf16, QkNorm::kNone, true), dense_made(kBf16, QkNorm::kNone, false);
    const DecoderLayer layer(made.config, made.weights);
    const DecoderLayer dense(dense_made.config, dense_made.weights);
    Workspace workspace({}, layer.workspace_bytes(3));
    const auto bad = [&](const DecoderLayer& which,
                         const std::function<void(ActivationTensors&)>& change, const char* text,
                         std::source_location where = std::source_location::current()) {
        Buffers buffers(kBf16, 3);
        change(buffers.tensors);
        const Activations activations(buffers.tensors);
        const std::string wanted = std::string("DecoderLayer: ") + text;
        expect_invalid([&] { which.project_qkv(activations, true); }, wanted, where);
        expect_invalid([&] { which.after_attention(activations, workspace); }, wanted, where);
    };
    bad(layer, [](auto& a) { a.qkv.shape[1] -= 6; }, "qkv must");
    bad(layer, [](auto& a) { a.attended.shape[1] -= 6; }, "attended must");
    bad(layer, [](auto& a) { a.router_logits.shape[1] -= 1; }, "router_logits must");
    bad(layer, [](auto& a) { a.router_logits = {}; }, "router_logits must be given");
    bad(dense, [](auto& a) { a.inner = {}; }, "inner must be given");
    bad(dense, [](auto& a) { a.inner.shape[1] -= 1; }, "inner must");
    bad(
        layer,
        [](auto& a) {
            for (TensorView* view : {&a.residual, &a.normed, &a.delta}) view->shape[1] = 64;
        },
        "residual must");
    Buffers buffers(kF32, 3);
    expect_invalid([&] { layer.project_qkv(Activations(buffers.tensors), true); },
                   "DecoderLayer: residual must be bfloat16");
}

}  // namespace

void add_decoder_layer_tests(std::vector<Test>& tests) {
    tests.insert(
        tests.end(),
        {{"decoder_layer_halves_give_the_bits_of_the_ops_one_by_one",
          test_halves_give_the_bits_of_the_ops_one_by_one},
         {"decoder_layer_project_qkv_leaves_out_the_rotation_alone",
          test_project_qkv_leaves_out_the_rotation_alone},
         {"decoder_layer_names_the_bad_argument", test_decoder_layer_names_the_bad_argument},
         {"activations_name_the_bad_tensor", test_activations_name_the_bad_tensor},
         {"decoder_layer_calls_name_the_activations_that_do_not_fit",
          test_calls_name_the_activations_that_do_not_fit}});
}

}  // namespace moecore::test
