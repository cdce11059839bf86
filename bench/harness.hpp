#pragma once

// What every benchmark binary shares: options, random data, medians, a table or JSON lines.

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "moecore/buffer.hpp"
#include "moecore/tensor_view.hpp"
#include "roofs.hpp"

namespace moecore::bench {

double now_us();

/// Keeps a result alive, so that the work before it is not optimised away.
template <typename T>
void keep(const T& value) {
    asm volatile("" : : "g"(&value) : "memory");
}

struct Options {
    bool json = false;
    int repeats = 15;
    std::vector<int64_t> tokens;
    std::string shape;
    bool cuda = false;
    bool skewed = false;  ///< experts are chosen with odds that fall as 1 / rank
};
/// --json, --threads N, --tokens 1,8,512, --shape NAME, --repeats N, --device cpu|cuda, --skewed;
/// --help prints these and `own_options`, " [--flag VALUE]" of the benchmark itself, and exits.
/// Exits with a message on anything else.
Options parse_options(int argc, char** argv, std::vector<int64_t> default_tokens,
                      const char* own_options = "");

/// Sizes of one MoE layer. `scaled_from` is what was cut to fit a small machine.
struct LayerShape {
    const char* name;
    int64_t hidden_size, intermediate_size;
    int num_experts, top_k;
};
/// Real models' layers, the large ones with fewer experts, and the two small test shapes.
const std::vector<LayerShape>& layer_shapes();
/// The same models whole, for a GPU; DeepSeek-V3 as one of 8 ranks sees it.
const std::vector<LayerShape>& gpu_layer_shapes();

/// A tensor that owns its memory, filled with N(0, scale) in float32 or bfloat16.
struct OwnedTensor {
    Buffer buffer;
    TensorView view;
};
OwnedTensor random_tensor(DType dtype, std::initializer_list<int64_t> shape, float scale,
                          uint64_t seed);
OwnedTensor empty_tensor(DType dtype, std::initializer_list<int64_t> shape);
/// Router logits [T, E] float32 on the CPU, random or skewed.
OwnedTensor random_logits(int64_t num_tokens, int64_t num_experts, bool skewed, uint64_t seed);

/// One timed case. Bytes and flops are counted by the caller, next to the op's formula.
struct Sample {
    double time_us = 0;    ///< median
    double spread = 0;     ///< (third quartile - first) / median
    double read_gbps = 0;  ///< median of the probes right before and after each run
};

/// Runs `fn(i)` `repeats` times with rising i; the bandwidth is probed before and after each run
/// and runs during which it moved by more than 10 % are repeated (up to three times as many).
Sample measure(int repeats, BandwidthProbe& probe, const std::function<void(int)>& fn);

double median(std::vector<double> values);

/// Rows of named values: an aligned table as they come, or one JSON object a line.
class Report {
public:
    Report(bool json, std::vector<std::string> columns);
    void row(const std::vector<std::string>& values);
    void note(const std::string& text) const;  ///< a comment line; dropped in JSON

private:
    bool json_;
    std::vector<std::string> columns_;
};
std::string format(double value, int digits);

}  // namespace moecore::bench
