#include "moecore/kernels/embedding.hpp"

#include <algorithm>
#include <cstring>

#include "cpu/panels.hpp"
#include "cpu/parallel.hpp"

namespace moecore::cpu {
namespace {

constexpr int64_t kWordBytes = 4;  ///< a pair of bfloat16, or one float32

/// Copies one row's words out of its column of a panel.
void gather_column(const char* panel, int64_t num_words, char* output) {
    for (int64_t i = 0; i < num_words; ++i)
        std::memcpy(output + i * kWordBytes, panel + i * kPanelColumns * kWordBytes, kWordBytes);
}

void gather_row(const EmbeddingArgs& args, const PanelLayout& layout, int64_t token) {
    const int64_t id = args.id(token);
    const auto element_bytes = static_cast<int64_t>(size_of(args.dtype));
    char* output = static_cast<char*>(args.output) + token * args.output_stride * element_bytes;
    const char* weight = static_cast<const char*>(args.weight);
    if (!args.is_packed) {
        std::memcpy(output, weight + id * args.weight_stride * element_bytes,
                    static_cast<size_t>(args.width * element_bytes));
        return;
    }
    const char* column = weight + id / kPanelColumns * layout.panel_elements() * element_bytes +
                         id % kPanelColumns * kWordBytes;
    const int64_t row_bytes = args.width * element_bytes;
    const int64_t num_words = row_bytes / kWordBytes;
    gather_column(column, num_words, output);
    // An odd width of bfloat16 ends in half a word.
    std::memcpy(output + num_words * kWordBytes, column + num_words * kPanelColumns * kWordBytes,
                static_cast<size_t>(row_bytes % kWordBytes));
}

}  // namespace

void embedding(const EmbeddingArgs& args) {
    constexpr int64_t kElementsPerRange = 16 * 1024;
    const PanelLayout layout{args.num_rows, args.width, false, args.dtype};
    const int64_t grain = std::max<int64_t>(1, kElementsPerRange / args.width);
    parallel_ranges(args.num_tokens, grain, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) gather_row(args, layout, token);
    });
}

}  // namespace moecore::cpu
