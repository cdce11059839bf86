// The whole MoE layer: route, sort, both grouped GEMMs, combine.
//
//   bytes  the weights of the experts that this routing touches, hidden states and output
//   flops  6 * T * k * H * I
//
// Several layers of random weights take turns, so that every run finds its weights in memory, not
// in a cache. Every token is random: tokens that agree would all choose the same experts.

#include <algorithm>
#include <memory>

#include "gpu.hpp"
#include "harness.hpp"
#include "moecore/build_info.hpp"
#include "moecore/moe_layer.hpp"
#include "moecore/threads.hpp"
#include "reference.hpp"

using namespace moecore;
using namespace moecore::bench;

namespace {

constexpr size_t kColdBytes = size_t{400} << 20;  ///< total weights, at least: many times any cache

struct Layer {
    PackedWeights gate_up, down;
    std::unique_ptr<MoELayer> layer;
};

Layer make_layer(const LayerShape& shape, uint64_t index) {
    const int64_t h = shape.hidden_size, i = shape.intermediate_size;
    Layer made{PackedWeights(DType::kBFloat16, shape.num_experts, 2 * i, h, true),
               PackedWeights(DType::kBFloat16, shape.num_experts, h, i, false), nullptr};
    for (int e = 0; e < shape.num_experts; ++e) {
        const ExpertWeights expert = make_expert(shape, index, e);
        made.gate_up.pack_gated(e, expert.gate.view, expert.up.view);
        made.down.pack(e, expert.down.view);
    }
    return made;
}

MoEConfig layer_config(const LayerShape& shape) {
    MoEConfig config;
    config.hidden_size = shape.hidden_size;
    config.intermediate_size = shape.intermediate_size;
    config.num_experts = shape.num_experts;
    config.num_local_experts = shape.num_experts;
    config.routing.top_k = shape.top_k;
    config.activation.activation = Activation::kSwiglu;
    return config;
}

/// Experts that at least one token chose.
int active_experts(const OwnedTensor& logits, const LayerShape& shape) {
    const int64_t tokens = logits.view.shape[0];
    const OwnedTensor ids = empty_tensor(DType::kInt32, {tokens, shape.top_k});
    const OwnedTensor weights = empty_tensor(DType::kFloat32, {tokens, shape.top_k});
    topk_routing(logits.view, {}, {.top_k = shape.top_k}, ids.view, weights.view);
    std::vector<bool> seen(static_cast<size_t>(shape.num_experts));
    for (int64_t i = 0; i < ids.view.num_elements(); ++i)
        seen[static_cast<size_t>(ids.view.as<int32_t>()[i])] = true;
    int count = 0;
    for (const bool is_active : seen) count += is_active;
    return count;
}

void run_on_cpu(const Options& options) {
    BandwidthProbe probe;
    const double peak = matmul_gflops(true);
    Report report(options.json, {"shape", "T", "active", "MB", "GFLOP", "GB/s roof", "floor_us",
                                 "time_us", "x_floor", "GB/s", "GFLOP/s", "spread", "correct"});
    report.note("isa " + build_info().cpu_isa + ", threads " + std::to_string(num_threads()) +
                ", matmul peak " + format(peak, 0) + " GFLOP/s");
    for (const LayerShape& shape : layer_shapes()) {
        if (!options.shape.empty() && options.shape != shape.name) continue;
        const size_t layer_bytes = static_cast<size_t>(shape.num_experts) * 6 *
                                   static_cast<size_t>(shape.hidden_size) *
                                   static_cast<size_t>(shape.intermediate_size);
        const auto num_layers =
            static_cast<int>(std::max<size_t>(1, (kColdBytes + layer_bytes - 1) / layer_bytes));
        std::vector<Layer> layers;
        layers.reserve(static_cast<size_t>(num_layers));
        for (int l = 0; l < num_layers; ++l)
            layers.push_back(make_layer(shape, static_cast<uint64_t>(l)));
        for (Layer& layer : layers)
            layer.layer = std::make_unique<MoELayer>(
                layer_config(shape), MoEWeights{.gate_up = layer.gate_up, .down = layer.down});
        for (const int64_t tokens : options.tokens) {
            Workspace workspace({}, layers[0].layer->workspace_bytes(tokens));
            const OwnedTensor hidden =
                random_tensor(DType::kBFloat16, {tokens, shape.hidden_size}, 1.0f, 7);
            const OwnedTensor output = empty_tensor(DType::kBFloat16, {tokens, shape.hidden_size});
            std::vector<OwnedTensor> logits;
            double active = 0;
            for (int l = 0; l < 8; ++l) {
                logits.push_back(random_tensor(DType::kFloat32, {tokens, shape.num_experts}, 1.0f,
                                               100 + static_cast<uint64_t>(l)));
                active += active_experts(logits.back(), shape) / 8.0;
            }
            const auto run = [&](int i) {
                const auto l = static_cast<size_t>(i);
                layers[l % layers.size()].layer->forward(hidden.view, logits[l % 8].view,
                                                         output.view, workspace);
            };
            // One sample is a pass over the layers, so that short runs are not lost in the clock.
            const int passes = static_cast<int>(layers.size());
            const Sample sample = measure(options.repeats, probe, [&](int i) {
                for (int p = 0; p < passes; ++p) run(i * passes + p);
            });
            const double time_us = sample.time_us / passes;
            const double bytes = active * 6.0 * static_cast<double>(shape.hidden_size) *
                                     static_cast<double>(shape.intermediate_size) +
                                 4.0 * static_cast<double>(tokens * shape.hidden_size);
            const double flops = 6.0 * static_cast<double>(tokens * shape.top_k) *
                                 static_cast<double>(shape.hidden_size) *
                                 static_cast<double>(shape.intermediate_size);
            const double floor_us =
                std::max(bytes / sample.read_gbps / 1e3, peak > 0 ? flops / peak / 1e3 : 0.0);
            run(0);
            const bool correct = check_layer(
                shape, [&](int e) { return make_expert(shape, 0, e); }, hidden.view, logits[0].view,
                output.view);
            report.row({shape.name, std::to_string(tokens), format(active, 1),
                        format(bytes / 1e6, 1), format(flops / 1e9, 2), format(sample.read_gbps, 1),
                        format(floor_us, 1), format(time_us, 1), format(time_us / floor_us, 2),
                        format(bytes / time_us / 1e3, 1), format(flops / time_us / 1e3, 1),
                        format(sample.spread, 2), correct ? "yes" : "NO"});
        }
    }
}

/// Plain weights of one layer on the GPU.
struct GpuLayer {
    OwnedTensor gate_up, down;
    MoELayer layer;

    GpuLayer(Gpu& gpu, const LayerShape& shape, uint64_t seed)
        : gate_up(gpu.random(DType::kBFloat16,
                             {shape.num_experts, 2 * shape.intermediate_size, shape.hidden_size},
                             0.05f, 2 * seed)),
          down(gpu.random(DType::kBFloat16,
                          {shape.num_experts, shape.hidden_size, shape.intermediate_size}, 0.05f,
                          2 * seed + 1)),
          layer(layer_config(shape), {.gate_up = gate_up.view, .down = down.view}) {}

    /// One expert's weights, copied to the CPU.
    ExpertWeights expert(Gpu& gpu, const LayerShape& shape, int e) const {
        const int64_t h = shape.hidden_size, i = shape.intermediate_size;
        ExpertWeights made{empty_tensor(DType::kBFloat16, {i, h}),
                           empty_tensor(DType::kBFloat16, {i, h}),
                           empty_tensor(DType::kBFloat16, {h, i})};
        uint16_t* gate = gate_up.view.as<uint16_t>() + e * 2 * i * h;
        uint16_t* first = down.view.as<uint16_t>() + e * h * i;
        gpu.download(made.gate.view.data, TensorView(gate, DType::kBFloat16, {i, h}));
        gpu.download(made.up.view.data, TensorView(gate + i * h, DType::kBFloat16, {i, h}));
        gpu.download(made.down.view.data, TensorView(first, DType::kBFloat16, {h, i}));
        return made;
    }
};

/// Layers in one graph: enough work for the clock, not too much for the patience.
int layers_at(int64_t tokens) {
    return tokens <= 8 ? 12 : tokens <= 128 ? 6 : tokens <= 512 ? 3 : tokens <= 4096 ? 2 : 1;
}

void run_on_gpu(const Options& options) {
    constexpr size_t kColdBytes = size_t{2} << 30;
    constexpr double kRecordedTflops = 803;  // cuBLAS on an H100, where this process finds none
    Gpu gpu;
    const double gbps = gpu.read_gbps();
    const double measured = gpu.matmul_tflops();
    const double tflops = measured > 0 ? measured : kRecordedTflops;
    Report report(options.json, {"shape", "routing", "T", "active", "MB", "GFLOP", "floor_us",
                                 "time_us", "of_floor", "GB/s", "TFLOP/s", "spread", "correct"});
    report.note(gpu.name() + ", read " + format(gbps, 0) + " GB/s, matmul " + format(tflops, 0) +
                " TFLOP/s" + (measured > 0 ? " (cuBLAS, this process)" : " (recorded)"));
    for (const LayerShape& shape : gpu_layer_shapes()) {
        if (!options.shape.empty() && options.shape != shape.name) continue;
        const size_t layer_bytes = static_cast<size_t>(shape.num_experts) * 6 *
                                   static_cast<size_t>(shape.hidden_size) *
                                   static_cast<size_t>(shape.intermediate_size);
        const size_t num_layers = std::max<size_t>(2, (kColdBytes + layer_bytes - 1) / layer_bytes);
        std::vector<std::unique_ptr<GpuLayer>> layers;
        for (size_t l = 0; l < num_layers; ++l)
            layers.push_back(std::make_unique<GpuLayer>(gpu, shape, l));
        for (const int64_t tokens : options.tokens) {
            Workspace workspace(Gpu::device(), layers[0]->layer.workspace_bytes(tokens));
            const OwnedTensor hidden =
                random_tensor(DType::kBFloat16, {tokens, shape.hidden_size}, 1.0f, 7);
            const OwnedTensor x = gpu.upload(hidden);
            const OwnedTensor out = gpu.empty(DType::kBFloat16, {tokens, shape.hidden_size});
            const int count = layers_at(tokens);
            std::vector<OwnedTensor> logits, on_gpu;
            double active = 0;
            for (int l = 0; l < count; ++l) {
                logits.push_back(random_logits(tokens, shape.num_experts, options.skewed,
                                               100 + static_cast<uint64_t>(l)));
                on_gpu.push_back(gpu.upload(logits.back()));
                active += static_cast<double>(active_experts(logits.back(), shape)) / count;
            }
            const auto run = [&](int i) {
                const auto l = static_cast<size_t>(i);
                layers[l % num_layers]->layer.forward(x.view, on_gpu[l].view, out.view, workspace,
                                                      gpu.stream());
            };
            const Sample sample = gpu.measure(count, options.repeats, tokens > 512, run);
            const double width = static_cast<double>(shape.hidden_size);
            const double inner = static_cast<double>(shape.intermediate_size);
            const double bytes = active * 6.0 * width * inner + 4.0 * width * double(tokens);
            const double flops = 6.0 * double(tokens * shape.top_k) * width * inner;
            const double floor_us = std::max(bytes / gbps / 1e3, flops / tflops / 1e6);
            run(0);
            const OwnedTensor output = empty_tensor(DType::kBFloat16, {tokens, shape.hidden_size});
            gpu.download(output.view.data, out.view);
            const bool correct = check_layer(
                shape, [&](int e) { return layers[0]->expert(gpu, shape, e); }, hidden.view,
                logits[0].view, output.view);
            report.row({shape.name, options.skewed ? "skewed" : "uniform", std::to_string(tokens),
                        format(active, 1), format(bytes / 1e6, 1), format(flops / 1e9, 2),
                        format(floor_us, 1), format(sample.time_us, 1),
                        format(floor_us / sample.time_us, 3),
                        format(bytes / sample.time_us / 1e3, 0),
                        format(flops / sample.time_us / 1e6, 1), format(sample.spread, 2),
                        correct ? "yes" : "NO"});
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    Options options = parse_options(argc, argv, {});
    const bool by_default = options.tokens.empty();
    if (by_default && options.cuda) options.tokens = {1, 8, 32, 128, 512, 4096, 16384};
    if (by_default && !options.cuda) options.tokens = {1, 2, 4, 8, 32, 128, 512};
    options.cuda ? run_on_gpu(options) : run_on_cpu(options);
    return 0;
}
