#include "moecore/draw_tokens.hpp"

#include <cmath>

#include "moecore/kernels/draw_tokens.hpp"
#include "moecore/kernels/memory.hpp"
#include "ops/check.hpp"

namespace moecore {

void draw_tokens(const TensorView& logits, std::span<const DrawParams> params,
                 std::span<DrawnToken> tokens, Stream stream) {
    const Check check("draw_tokens");
    check.dtype("logits", logits, {DType::kFloat32});
    check.shape("logits", logits, {Check::kAny, Check::kAny});
    check.rows_contiguous("logits", logits);
    const int64_t num_rows = logits.shape[0], vocab_size = logits.shape[1];
    check.that(vocab_size >= 1 && vocab_size <= kMaxDrawnVocab, "logits must have 1 to ",
               kMaxDrawnVocab, " columns, got ", vocab_size);
    const bool on_cuda = logits.device.type == DeviceType::kCuda;
    check.that(!on_cuda || num_rows <= kMaxDrawnRows, "logits must have at most ", kMaxDrawnRows,
               " rows on CUDA, got ", num_rows);
    check.that(std::ssize(params) == num_rows, "params must be one a row, ", num_rows, ", got ",
               params.size());
    check.that(std::ssize(tokens) == num_rows, "tokens must be one a row, ", num_rows, ", got ",
               tokens.size());
    for (int64_t n = 0; n < num_rows; ++n) {
        const auto& [temperature, min_p, noise] = params[static_cast<size_t>(n)];
        check.that(std::isfinite(temperature) && temperature >= 0,
                   "temperature must be finite and >= 0, got ", temperature, " in row ", n);
        check.that(min_p >= 0 && min_p <= 1, "min_p must be in [0, 1], got ", min_p, " in row ", n);
        check.that(noise >= 0 && noise < 1, "noise must be in [0, 1), got ", noise, " in row ", n);
    }
    const DrawTokensArgs args{
        .logits = logits.as<float>(),
        .logits_stride = logits.strides[0],
        .vocab_size = vocab_size,
        .params = params.data(),
        .tokens = tokens.data(),
        .num_rows = num_rows,
    };
    switch (logits.device.type) {
        case DeviceType::kCpu:
            return cpu::draw_tokens(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(logits.device.index);
            return cuda::draw_tokens(args, stream);
        }
    }
}

}  // namespace moecore
