// topk_routing of real models' routers.
//
//   bytes  T * E * 4 of logits read, T * k * 8 of ids and weights written
//   floor  the bytes at the read bandwidth, or an empty parallel region if that is more
//
// The logits take turns in a few buffers; small ones stay in cache, as the router leaves them.

#include <algorithm>
#include <vector>

#include "gpu.hpp"
#include "harness.hpp"
#include "moecore/build_info.hpp"
#include "moecore/threads.hpp"
#include "moecore/topk_routing.hpp"
#include "reference.hpp"

using namespace moecore;
using namespace moecore::bench;

namespace {

struct Router {
    const char* name;
    int num_experts;
    bool with_bias;
    RoutingConfig config;
};

const Router kRouters[] = {
    {"mixtral-8x7b", 8, false, {.top_k = 2}},
    {"qwen3-30b-a3b", 128, false, {.top_k = 8}},
    {"deepseek-v3",
     256,
     true,
     {.top_k = 8,
      .score_function = ScoreFunction::kSigmoid,
      .scale = 2.5f,
      .norm_epsilon = 1e-20f,
      .group_limit = GroupLimit::kTop2Sum,
      .num_groups = 8,
      .topk_group = 4}},
    {"gpt-oss-20b", 32, false, {.top_k = 4, .score_function = ScoreFunction::kRawLogits}},
};

constexpr size_t kBuffers = 4;
constexpr double kSampleBytes = 2e6;  ///< of one sample: some 100 us, far above the clock's grain

void run_on_cpu(const Options& options) {
    BandwidthProbe probe;
    const double region_us = empty_region_us();
    Report report(options.json, {"shape", "E", "k", "T", "KB", "GB/s roof", "floor_us", "time_us",
                                 "x_floor", "ns/token", "spread", "correct"});
    report.note("isa " + build_info().cpu_isa + ", threads " + std::to_string(num_threads()) +
                ", empty parallel region " + format(region_us, 2) + " us");
    for (const Router& router : kRouters) {
        if (!options.shape.empty() && options.shape != router.name) continue;
        const int64_t experts = router.num_experts, top_k = router.config.top_k;
        const OwnedTensor bias = random_tensor(DType::kFloat32, {experts}, 0.1f, 5);
        const TensorView bias_view = router.with_bias ? bias.view : TensorView{};
        for (const int64_t tokens : options.tokens) {
            std::vector<OwnedTensor> logits;
            for (size_t i = 0; i < kBuffers; ++i)
                logits.push_back(random_tensor(DType::kFloat32, {tokens, experts}, 2.0f, 11 + i));
            const OwnedTensor ids = empty_tensor(DType::kInt32, {tokens, top_k});
            const OwnedTensor weights = empty_tensor(DType::kFloat32, {tokens, top_k});
            const auto run = [&](size_t i) {
                topk_routing(logits[i % kBuffers].view, bias_view, router.config, ids.view,
                             weights.view);
            };
            const double bytes =
                static_cast<double>(tokens) * static_cast<double>(4 * experts + 8 * top_k);
            const auto passes = static_cast<size_t>(std::clamp(kSampleBytes / bytes, 1.0, 1000.0));
            const Sample sample = measure(options.repeats, probe, [&](int) {
                for (size_t p = 0; p < passes; ++p) run(p);
            });
            const double time_us = sample.time_us / static_cast<double>(passes);
            const double floor_us = std::max(bytes / sample.read_gbps / 1e3, region_us);
            run(0);
            const bool correct =
                check_routing(router.config, logits[0].view, bias_view, ids.view, weights.view);
            report.row({router.name, std::to_string(experts), std::to_string(top_k),
                        std::to_string(tokens), format(bytes / 1e3, 1), format(sample.read_gbps, 1),
                        format(floor_us, 2), format(time_us, 2), format(time_us / floor_us, 2),
                        format(time_us * 1e3 / static_cast<double>(tokens), 1),
                        format(sample.spread, 2), correct ? "yes" : "NO"});
        }
    }
}

void run_on_gpu(const Options& options) {
    constexpr int kCount = 20;
    Gpu gpu;
    const double gbps = gpu.read_gbps();
    Report report(options.json, {"shape", "E", "k", "T", "KB", "floor_us", "time_us", "ns/token",
                                 "spread", "correct"});
    report.note(gpu.name() + ", read " + format(gbps, 0) + " GB/s; " + std::to_string(kCount) +
                " calls in a CUDA graph");
    for (const Router& router : kRouters) {
        if (!options.shape.empty() && options.shape != router.name) continue;
        const int64_t experts = router.num_experts, top_k = router.config.top_k;
        const OwnedTensor bias = random_tensor(DType::kFloat32, {experts}, 0.1f, 5);
        const OwnedTensor bias_gpu = gpu.upload(bias);
        for (const int64_t tokens : options.tokens) {
            const OwnedTensor logits = random_tensor(DType::kFloat32, {tokens, experts}, 2.0f, 11);
            const OwnedTensor x = gpu.upload(logits);
            const OwnedTensor ids = gpu.empty(DType::kInt32, {tokens, top_k});
            const OwnedTensor weights = gpu.empty(DType::kFloat32, {tokens, top_k});
            const Sample sample = gpu.measure(kCount, options.repeats, false, [&](int) {
                topk_routing(x.view, router.with_bias ? bias_gpu.view : TensorView{}, router.config,
                             ids.view, weights.view, gpu.stream());
            });
            const OwnedTensor ids_cpu = empty_tensor(DType::kInt32, {tokens, top_k});
            const OwnedTensor weights_cpu = empty_tensor(DType::kFloat32, {tokens, top_k});
            gpu.download(ids_cpu.view.data, ids.view);
            gpu.download(weights_cpu.view.data, weights.view);
            const bool correct = check_routing(router.config, logits.view,
                                               router.with_bias ? bias.view : TensorView{},
                                               ids_cpu.view, weights_cpu.view);
            const double bytes =
                static_cast<double>(tokens) * static_cast<double>(4 * experts + 8 * top_k);
            report.row({router.name, std::to_string(experts), std::to_string(top_k),
                        std::to_string(tokens), format(bytes / 1e3, 1),
                        format(bytes / gbps / 1e3, 2), format(sample.time_us, 2),
                        format(sample.time_us * 1e3 / static_cast<double>(tokens), 1),
                        format(sample.spread, 2), correct ? "yes" : "NO"});
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    const Options options = parse_options(argc, argv, {1, 8, 32, 128, 512, 4096, 16384});
    options.cuda ? run_on_gpu(options) : run_on_cpu(options);
    return 0;
}
