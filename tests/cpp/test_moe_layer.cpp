#include <algorithm>
#include <functional>
#include <limits>

#include "moecore/moe_layer.hpp"
#include "moecore/threads.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

struct LayerCase {
    DType dtype = DType::kFloat32;
    bool with_shared = true;
    bool with_shared_gate = true;
    bool with_bias = true;
    int first_expert = 0;
    int num_local = 5;
};

/// A layer of odd sizes: 5 experts, k = 2, swiglu, sigmoid scores.
struct Layer {
    static constexpr int64_t kHidden = 67, kInner = 33, kShared = 35;
    static constexpr int kExperts = 5, kTopK = 2;

    explicit Layer(const LayerCase& layer_case) : c(layer_case) {
        Random random(17);
        config.hidden_size = kHidden;
        config.intermediate_size = kInner;
        config.num_experts = kExperts;
        config.first_expert = c.first_expert;
        config.num_local_experts = c.num_local;
        config.routing = {.top_k = kTopK, .score_function = ScoreFunction::kSigmoid};
        config.activation.activation = Activation::kSwiglu;
        config.shared_intermediate_size = c.with_shared ? kShared : 0;
        config.dtype = c.dtype;
        const int64_t local = c.num_local;
        gate_up = random.array(c.dtype, local * 2 * kInner * kHidden, 0.3);
        down = random.array(c.dtype, local * kHidden * kInner, 0.3);
        gate_up_bias = random.array(DType::kFloat32, local * 2 * kInner);
        down_bias = random.array(c.dtype, local * kHidden);
        selection_bias = random.array(DType::kFloat32, kExperts);
        shared_gate_up = random.array(c.dtype, 2 * kShared * kHidden, 0.3);
        shared_down = random.array(c.dtype, kHidden * kShared, 0.3);
        shared_gate = random.array(c.dtype, kHidden, 0.3);
        weights.gate_up = gate_up.view({local, 2 * kInner, kHidden});
        weights.down = down.view({local, kHidden, kInner});
        if (c.with_bias) {
            weights.gate_up_bias = gate_up_bias.view({local, 2 * kInner});
            weights.down_bias = down_bias.view({local, kHidden});
            weights.selection_bias = selection_bias.view({kExperts});
        }
        if (c.with_shared) {
            weights.shared_gate_up = shared_gate_up.view({2 * kShared, kHidden});
            weights.shared_down = shared_down.view({kHidden, kShared});
            if (c.with_shared_gate) weights.shared_gate = shared_gate.view({1, kHidden});
        }
    }

    double round(double x) const {
        Array one(c.dtype, 1);
        one.set(0, x);
        return one[0];
    }

    /// down(swiglu(x @ gate_up)), rounded to the layer's dtype where the layer stores it.
    /// `magnitude` gets the sum of the absolute terms of each feature.
    std::vector<double> mlp(const std::vector<double>& x, const Array& up_weights,
                            const Array& down_weights, int64_t inner, int64_t expert, bool biased,
                            std::vector<double>& magnitude) const {
        const auto matrix_row = [&](const Array& w, int64_t row, const std::vector<double>& v) {
            double sum = 0.0;
            for (size_t i = 0; i < v.size(); ++i)
                sum += w[row * static_cast<int64_t>(v.size()) + static_cast<int64_t>(i)] * v[i];
            return sum;
        };
        std::vector<double> middle;
        for (int64_t f = 0; f < inner; ++f) {
            const int64_t row = expert * 2 * inner + f;
            const double g = matrix_row(up_weights, row, x) + (biased ? gate_up_bias[row] : 0.0);
            const double u =
                matrix_row(up_weights, row + inner, x) + (biased ? gate_up_bias[row + inner] : 0.0);
            middle.push_back(round(g * sigmoid(g) * u));
        }
        std::vector<double> result;
        for (int64_t h = 0; h < kHidden; ++h) {
            const int64_t row = expert * kHidden + h;
            double value = biased ? down_bias[row] : 0.0, size = std::abs(value);
            for (int64_t f = 0; f < inner; ++f) {
                const double term = down_weights[row * inner + f] * middle[static_cast<size_t>(f)];
                value += term;
                size += std::abs(term);
            }
            result.push_back(round(value));
            magnitude.push_back(size);
        }
        return result;
    }

    /// Runs T tokens in a workspace of exactly workspace_bytes(T) and compares with float64.
    Array check(const MoELayer& layer, int64_t num_tokens) {
        Random random(static_cast<uint32_t>(num_tokens) + 1);
        Array hidden = random.array(c.dtype, num_tokens * kHidden);
        Array logits = random.array(DType::kFloat32, num_tokens * kExperts, 3.0);
        Array output(c.dtype, num_tokens * kHidden), routed(c.dtype, num_tokens * kHidden);
        Workspace workspace({}, layer.workspace_bytes(num_tokens));
        layer.forward(hidden.view({num_tokens, kHidden}), logits.view({num_tokens, kExperts}),
                      output.view({num_tokens, kHidden}), workspace);

        Array ids(DType::kInt32, num_tokens * kTopK), scores(DType::kFloat32, num_tokens * kTopK);
        topk_routing(logits.view({num_tokens, kExperts}), weights.selection_bias, config.routing,
                     ids.view({num_tokens, kTopK}), scores.view({num_tokens, kTopK}));
        layer.forward_routed(hidden.view({num_tokens, kHidden}), ids.view({num_tokens, kTopK}),
                             scores.view({num_tokens, kTopK}), routed.view({num_tokens, kHidden}),
                             workspace);
        expect(routed.bytes() == output.bytes(), "forward is forward_routed of its own routing");

        // Of a term: a stored intermediate that lies near a tie may round to the neighbour, one
        // unit in the last place, and so may the row; float32 sums of 67 + 35 terms on the way,
        // whose own terms are up to ten times their sum, lose less than 2000 units of 2^-24.
        const double relative = (c.dtype == DType::kBFloat16 ? 2 * 0x1p-8 : 0.0) + 2000 * 0x1p-24;
        for (int64_t t = 0; t < num_tokens; ++t) {
            std::vector<double> x, wanted(kHidden), size(kHidden);
            for (int64_t h = 0; h < kHidden; ++h) x.push_back(hidden[t * kHidden + h]);
            const auto accumulate = [&](double scale, const std::vector<double>& row,
                                        const std::vector<double>& magnitude) {
                for (size_t h = 0; h < wanted.size(); ++h) {
                    wanted[h] += scale * row[h];
                    size[h] += std::abs(scale) * magnitude[h];
                }
            };
            for (int64_t j = 0; j < kTopK; ++j) {
                const auto expert = static_cast<int64_t>(ids[t * kTopK + j]) - c.first_expert;
                if (expert < 0 || expert >= c.num_local) continue;
                std::vector<double> magnitude;
                const auto row = mlp(x, gate_up, down, kInner, expert, c.with_bias, magnitude);
                accumulate(scores[t * kTopK + j], row, magnitude);
            }
            if (c.with_shared) {
                double gate = 0.0;
                for (int64_t h = 0; h < kHidden; ++h)
                    gate += shared_gate[h] * x[static_cast<size_t>(h)];
                std::vector<double> magnitude;
                const auto row = mlp(x, shared_gate_up, shared_down, kShared, 0, false, magnitude);
                accumulate(c.with_shared_gate ? sigmoid(gate) : 1.0, row, magnitude);
            }
            for (size_t h = 0; h < wanted.size(); ++h)
                expect_close(output[t * kHidden + static_cast<int64_t>(h)], wanted[h],
                             relative * size[h], c.dtype, concat("token ", t, " feature ", h));
        }
        return output;
    }

    LayerCase c;
    MoEConfig config;
    MoEWeights weights;
    Array gate_up, down, gate_up_bias, down_bias, selection_bias;
    Array shared_gate_up, shared_down, shared_gate;
};

void test_layer_matches_float64_in_a_workspace_of_exact_size() {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
        for (const LayerCase& c :
             {LayerCase{dtype, true, true, true, 0, 5}, LayerCase{dtype, true, false, false, 0, 5},
              LayerCase{dtype, false, false, true, 0, 5}, LayerCase{dtype, true, true, false, 2, 2},
              LayerCase{dtype, false, false, false, 4, 1}}) {
            Layer sample(c);
            const MoELayer layer(sample.config, sample.weights);
            for (const int64_t num_tokens : {0, 1, 2, 13}) sample.check(layer, num_tokens);
        }
}

void test_layer_bits_do_not_depend_on_packing_or_threads() {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        Layer sample({.dtype = dtype});
        const MoELayer layer(sample.config, sample.weights);
        set_num_threads(1);
        const Array wanted = sample.check(layer, 13);
        set_num_threads(2);
        expect(sample.check(layer, 13).bytes() == wanted.bytes(), "two threads");

        constexpr int64_t kHidden = Layer::kHidden, kInner = Layer::kInner;
        constexpr int64_t kShared = Layer::kShared;
        PackedWeights gate_up(dtype, 5, 2 * kInner, kHidden, true);
        PackedWeights down(dtype, 5, kHidden, kInner, false);
        PackedWeights shared_gate_up(dtype, 1, 2 * kShared, kHidden, true);
        PackedWeights shared_down(dtype, 1, kHidden, kShared, false);
        const auto part = [&](Array& weights, int64_t first_row, int64_t rows, int64_t width) {
            return TensorView(static_cast<char*>(weights.data()) +
                                  first_row * width * static_cast<int64_t>(size_of(dtype)),
                              dtype, {rows, width});
        };
        for (int64_t e = 0; e < 5; ++e) {
            gate_up.pack_gated(e, part(sample.gate_up, e * 2 * kInner, kInner, kHidden),
                               part(sample.gate_up, (e * 2 + 1) * kInner, kInner, kHidden));
            down.pack(e, part(sample.down, e * kHidden, kHidden, kInner));
        }
        shared_gate_up.pack_gated(0, part(sample.shared_gate_up, 0, kShared, kHidden),
                                  part(sample.shared_gate_up, kShared, kShared, kHidden));
        shared_down.pack(0, part(sample.shared_down, 0, kHidden, kShared));
        MoEWeights packed = sample.weights;
        packed.gate_up = gate_up;
        packed.down = down;
        packed.shared_gate_up = shared_gate_up;
        packed.shared_down = shared_down;
        const MoELayer packed_layer(sample.config, packed);
        for (const int threads : {1, 2}) {
            set_num_threads(threads);
            expect(sample.check(packed_layer, 13).bytes() == wanted.bytes(), "packed");
        }
    }
}

void test_layer_drops_ids_of_nobody() {
    Layer sample({.with_shared = false});
    const MoELayer layer(sample.config, sample.weights);
    Random random(1);
    Array hidden = random.array(DType::kFloat32, 2 * Layer::kHidden);
    Array ids = int_array(DType::kInt32, {-1, 5, -7, 99}),
          scores = random.array(DType::kFloat32, 4);
    Array output = random.array(DType::kFloat32, 2 * Layer::kHidden);
    Workspace workspace({}, layer.workspace_bytes(2));
    layer.forward_routed(hidden.view({2, Layer::kHidden}), ids.view({2, 2}), scores.view({2, 2}),
                         output.view({2, Layer::kHidden}), workspace);
    for (int64_t i = 0; i < output.size(); ++i) expect(output[i] == 0.0, "nothing was added");
}

void test_layer_names_the_bad_argument() {
    Layer sample({});
    const auto bad = [&](const std::function<void(MoEConfig&, MoEWeights&)>& change,
                         const char* text,
                         std::source_location where = std::source_location::current()) {
        MoEConfig config = sample.config;
        MoEWeights weights = sample.weights;
        change(config, weights);
        expect_invalid([&] { MoELayer(config, weights); }, std::string("MoELayer: ") + text, where);
    };
    bad([](auto& c, auto&) { c.hidden_size = 0; }, "hidden_size must");
    bad([](auto& c, auto&) { c.intermediate_size = 0; }, "intermediate_size must");
    bad([](auto& c, auto&) { c.shared_intermediate_size = -1; }, "shared_intermediate_size must");
    bad([](auto& c, auto&) { c.shared_intermediate_size = 0; }, "shared_intermediate_size must");
    bad([](auto& c, auto&) { c.first_expert = 1; }, "first_expert and num_local_experts must");
    bad([](auto& c, auto&) { c.first_expert = std::numeric_limits<int>::max(); },
        "first_expert and num_local_experts must");
    bad([](auto& c, auto&) { c.dtype = DType::kInt32; }, "dtype must");
    bad([](auto& c, auto&) { c.activation = {}; }, "activation must");
    bad([](auto& c, auto&) { c.routing.top_k = 6; }, "top_k must");
    bad([](auto&, auto& w) { w.gate_up = {}; }, "gate_up must");
    bad([](auto&, auto& w) { w.gate_up.plain.shape[2] = 66; }, "gate_up must");
    bad([](auto&, auto& w) { w.gate_up.plain.dtype = DType::kBFloat16; }, "gate_up must");
    bad([](auto&, auto& w) { w.down.plain.shape[0] = 4; }, "down must");
    bad([](auto&, auto& w) { w.gate_up_bias.shape[1] = 65; }, "gate_up_bias must");
    bad([](auto&, auto& w) { w.down_bias.shape[1] = 65; }, "down_bias must");
    bad([](auto&, auto& w) { w.selection_bias.shape[0] = 4; }, "selection_bias must");
    bad([](auto&, auto& w) { w.shared_gate_up = {}; }, "shared_gate_up must");
    bad([](auto&, auto& w) { w.shared_down.plain.shape[1] = 34; }, "shared_down must");
    bad([](auto&, auto& w) { w.shared_gate.shape[1] = 66; }, "shared_gate must");
    bad([](auto&, auto& w) { w.shared_gate.dtype = DType::kBFloat16; }, "shared_gate must");
    const PackedWeights packed(DType::kFloat32, 4, 2 * Layer::kInner, Layer::kHidden, true);
    bad([&](auto&, auto& w) { w.gate_up = packed; }, "gate_up must");
    const PackedWeights not_gated(DType::kFloat32, 5, 2 * Layer::kInner, Layer::kHidden, false);
    bad([&](auto&, auto& w) { w.gate_up = not_gated; }, "gate_up must be packed with gated = true");

    bad([](auto&, auto& w) { w.gate_up.plain.device = kOtherDevice; }, "down must be on cuda:0");
    bad([](auto&, auto& w) { w.down.plain.device = kOtherDevice; }, "down must be on cpu");
    bad([](auto&, auto& w) { w.down.plain.strides[1] = -1; },
        "down must have one of their last two");
    bad([](auto&, auto& w) { w.down.plain.dtype = kBf16; }, "down must be float32");
    const std::pair<const char*, TensorView MoEWeights::*> tensors[] = {
        {"gate_up_bias", &MoEWeights::gate_up_bias},
        {"down_bias", &MoEWeights::down_bias},
        {"selection_bias", &MoEWeights::selection_bias},
        {"shared_gate", &MoEWeights::shared_gate}};
    for (const auto& [name, member] : tensors) {
        bad([&](auto&, auto& w) { (w.*member).device = kOtherDevice; },
            concat(name, " must be on cpu, got cuda:0").c_str());
        bad([&](auto&, auto& w) { (w.*member).dtype = kBf16; },
            concat(name, " must be float32, got bfloat16").c_str());
        if (member != &MoEWeights::shared_gate)  // one row may have any stride
            bad([&](auto&, auto& w) { (w.*member).strides.fill(2); },
                concat(name, member == &MoEWeights::selection_bias ? " must be" : " must have",
                       " contiguous")
                    .c_str());
    }
    const std::pair<const char*, GroupedGemmWeights MoEWeights::*> shared[] = {
        {"shared_gate_up", &MoEWeights::shared_gate_up}, {"shared_down", &MoEWeights::shared_down}};
    for (const auto& [name, member] : shared) {
        bad([&](auto&, auto& w) { (w.*member).plain.device = kOtherDevice; },
            concat(name, " must be on cpu, got cuda:0").c_str());
        bad([&](auto&, auto& w) { (w.*member).plain.dtype = kBf16; },
            concat(name, " must be float32, got bfloat16").c_str());
    }

    const MoELayer layer(sample.config, sample.weights);
    constexpr int64_t kHidden = Layer::kHidden;
    Random random(2);
    Array hidden = random.array(DType::kFloat32, 3 * kHidden);
    Array logits = random.array(DType::kFloat32, 3 * 5), output(DType::kFloat32, 3 * kHidden);
    const TensorView x = hidden.view({3, kHidden}), l = logits.view({3, 5}),
                     y = output.view({3, kHidden});
    Workspace workspace({}, layer.workspace_bytes(3));
    const auto bad_call = [&](TensorView x, TensorView l, TensorView y, const char* text,
                              std::source_location where = std::source_location::current()) {
        expect_invalid([&] { layer.forward(x, l, y, workspace); }, text, where);
    };
    const auto changed = [](TensorView view, auto change) {
        change(view);
        return view;
    };
    const auto reverse = [](TensorView& view) { view.strides[0] = -view.strides[0]; };
    bad_call({}, l, y, "hidden_states must");
    bad_call(hidden.view({3 * kHidden}), l, y, "hidden_states must");
    bad_call(changed(x, [](auto& v) { v.dtype = DType::kBFloat16; }), l, y, "hidden_states must");
    bad_call(x, logits.view({5, 3}), y, "router_logits must");
    bad_call(x, changed(l, [](auto& v) { v.dtype = DType::kInt32; }), y, "router_logits must");
    bad_call(x, changed(l, reverse), y, "router_logits must");
    bad_call(x, l, {}, "output must");
    bad_call(x, l, output.view({kHidden, 3}), "output must");
    bad_call(x, l, changed(y, reverse), "output must");
    bad_call(x, l, changed(y, [](auto& v) { v.dtype = DType::kBFloat16; }), "output must");
    bad_call(x, l, x, "output must not overlap hidden_states");
    bad_call(x, TensorView(output.data(), kF32, {3, 5}), y,
             "output must not overlap router_logits");
    bad_call(x, l, TensorView(sample.down_bias.data(), kF32, {3, kHidden}),
             "output must not overlap down_bias");
    bad_call(x, l, TensorView(sample.shared_down.data(), kF32, {3, kHidden}),
             "output must not overlap shared_down");
    bad_call(x, l, on_other_device(y), "must be on cuda:0");
    bad_call(on_other_device(x), l, y, "must be on cuda:0");
    bad_call(x, on_other_device(l), y, "must be on cuda:0");
    Workspace small({}, layer.workspace_bytes(3) - 1);
    expect_invalid([&] { layer.forward(x, l, y, small); }, "Workspace: size must");
}

}  // namespace

void add_moe_layer_tests(std::vector<Test>& tests) {
    tests.insert(tests.end(),
                 {{"layer_matches_float64_in_a_workspace_of_exact_size",
                   test_layer_matches_float64_in_a_workspace_of_exact_size},
                  {"layer_bits_do_not_depend_on_packing_or_threads",
                   test_layer_bits_do_not_depend_on_packing_or_threads},
                  {"layer_drops_ids_of_nobody", test_layer_drops_ids_of_nobody},
                  {"layer_names_the_bad_argument", test_layer_names_the_bad_argument}});
}

}  // namespace moecore::test
