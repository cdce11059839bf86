#include "grouped_gemm/config.hpp"
#include "grouped_gemm/sm80_config.hpp"
#include "grouped_gemm/thin_config.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

using namespace cuda;

constexpr int kRowBytes = 128;  // of a K block

GemmConfig choose(int64_t num_rows, int64_t num_groups, int64_t k_dim = 2048) {
    return choose_config({.num_rows = num_rows,
                          .num_groups = num_groups,
                          .n = 4096,
                          .k_dim = k_dim,
                          .is_gated = true,
                          .num_multiprocessors = 132});
}

void a_user_names_a_kernel() {
    expect(gemm_choice("") == GemmChoice::kAuto && gemm_choice("auto") == GemmChoice::kAuto, "");
    expect(gemm_choice("simple") == GemmChoice::kSimple, "simple");
    expect(gemm_choice("sm80") == GemmChoice::kSm80, "sm80");
    expect_invalid([] { gemm_choice("sm90"); },
                   "MOECORE_CUDA_GEMM must be auto, simple or sm80, got sm90");
}

void every_choice_fits_into_shared_memory() {
    for (const int64_t num_groups : {1, 8, 32, 128, 1024}) {
        for (int64_t num_rows = 1; num_rows <= int64_t{1} << 20; num_rows += 1 + num_rows / 7) {
            const std::string problem = concat(num_rows, " rows of ", num_groups, " groups");
            const GemmConfig config = choose(num_rows, num_groups);
            const bool is_wide = weight_rows(config.kernel) == 256;
            expect(config.kernel != GemmKernel::kSimple, problem);
            const int most = is_wide ? 192 : config.kernel == GemmKernel::kSlim ? 32 : 64;
            expect(config.max_tokens >= 8 && config.max_tokens <= most, problem);
            expect(config.max_tokens % (is_wide ? 16 : 8) == 0, problem);
            expect(config.num_stages >= 3 && config.num_stages <= 12, problem);
            const int64_t stage = kRowBytes * (weight_rows(config.kernel) + config.max_tokens);
            expect(config.num_stages * stage <= ring_bytes(config.kernel), problem);
            expect(config.sharing >= 1 && config.sharing <= 16, problem);
        }
    }
}

void more_rows_never_take_a_smaller_tile() {
    for (const int64_t num_groups : {1, 8, 32, 128}) {
        int before = 0;
        for (int64_t num_rows = 1; num_rows <= 512 * num_groups; num_rows += 1 + num_rows / 50) {
            const int tokens = choose(num_rows, num_groups).max_tokens;
            expect(tokens >= before, concat(num_rows, " rows of ", num_groups, " groups: ", tokens,
                                            " after ", before));
            before = tokens;
        }
    }
}

void real_models_decode_narrow_and_prefill_wide() {
    struct Model {
        int64_t num_experts, top_k;
    };
    for (const Model& model : {Model{8, 2}, Model{128, 8}, Model{256, 8}, Model{32, 4}}) {
        for (const int64_t num_tokens : {1, 32}) {
            const GemmConfig decode = choose(num_tokens * model.top_k, model.num_experts);
            expect(weight_rows(decode.kernel) <= 128, concat("T = ", num_tokens));
        }
        const GemmConfig prefill = choose(4096 * model.top_k, model.num_experts);
        expect(weight_rows(prefill.kernel) == 256 && prefill.max_tokens >= 160, "T = 4096");
    }
}

void tiles_are_slim_where_that_spreads_the_weights() {
    const auto kernel = [](int64_t num_rows, int64_t num_groups, int64_t n) {
        return choose_config({.num_rows = num_rows,
                              .num_groups = num_groups,
                              .n = n,
                              .k_dim = 2048,
                              .is_gated = false,
                              .num_multiprocessors = 132})
            .kernel;
    };
    expect(kernel(2, 8, 4096) == GemmKernel::kSlim, "64 tiles of 128 rows leave 68 idle");
    expect(kernel(4, 32, 4224) == GemmKernel::kSlim, "264 slim tiles are two for each");
    expect(kernel(4, 32, 4232) == GemmKernel::kNarrow, "four slim tiles more need a second wave");
    expect(kernel(33, 1, 4096) == GemmKernel::kNarrow, "more rows than a slim tile holds");
}

void groups_take_pairs_where_those_have_few_tiles_more() {
    expect(choose(8 * 256, 8).kernel == GemmKernel::kWide, "256 rows a group: 2 tiles, short K");
    expect(choose(8 * 256, 8, 4096).kernel == GemmKernel::kPair, "256 rows a group, long K");
    expect(choose(8 * 190, 8, 4096).kernel == GemmKernel::kWide, "190 rows a group: 1 tile");
    expect(choose(8 * 512, 8).kernel == GemmKernel::kWide, "512 rows a group: 3 tiles, or 4");
    expect(choose(8 * 1024, 8).kernel == GemmKernel::kPair, "1024 rows a group: 6 tiles");
    expect(choose(8 * 2048, 8).kernel == GemmKernel::kWide, "2048 rows a group: 11 tiles, or 12");
    expect(choose(8 * 4000, 8).kernel == GemmKernel::kPair, "4000 rows a group: 21 tiles, or 22");
    expect(choose(385, 1).kernel == GemmKernel::kWide, "one group of 385 rows");
    expect(choose(577, 1).kernel == GemmKernel::kPair, "one group of 577 rows");
}

void row_tiles_that_share_weights_fit_into_the_cache() {
    constexpr int64_t kCache = 16 << 20;
    expect(row_tiles_in_cache(192, 2048, kCache) == 16, "K = 2048: as many as are ever taken");
    expect(row_tiles_in_cache(192, 7168, kCache) == 6, "K = 7168: 2.75 MB each");
    expect(row_tiles_in_cache(192, 1 << 20, kCache) == 1, "a K of which not one fits");
}

GemmProblem projection(int64_t num_rows, int64_t n, int64_t k_dim) {
    return {.num_rows = num_rows,
            .num_groups = 1,
            .n = n,
            .k_dim = k_dim,
            .is_gated = false,
            .num_multiprocessors = 132};
}

void every_thin_choice_fits_into_shared_memory() {
    for (const int64_t n : {8, 128, 2048, 5120, 151936}) {
        for (const int64_t k_dim : {64, 320, 2048, 7168}) {
            for (int64_t num_rows = 1; num_rows <= 20000; num_rows += 1 + num_rows / 7) {
                const ThinConfig config = choose_thin(projection(num_rows, n, k_dim));
                const std::string problem = concat(num_rows, " rows, ", n, " x ", k_dim);
                expect(config.weight_rows % 16 == 0 && config.weight_rows <= 64, problem);
                expect(config.max_tokens % 8 == 0 && config.max_tokens <= 128, problem);
                expect(config.num_stages >= 1 && config.num_stages <= kThinMaxStages, problem);
                const int64_t stage =
                    config.stage_depth * kRowBytes * (config.weight_rows + config.max_tokens);
                expect(config.num_stages * stage <= kThinRingBytes, problem);
                expect(
                    config.num_stages >= 4 || config.num_stages * config.stage_depth * 64 >= k_dim,
                    problem);
            }
        }
    }
}

void projections_of_decode_are_thin_and_large_ones_are_not() {
    for (const int64_t num_rows : {1, 8, 32, 128}) {
        for (const auto& [n, k_dim] : {std::pair{128, 2048}, {2048, 4096}, {5120, 2048}})
            expect(choose_thin(projection(num_rows, n, k_dim)).is_better, concat(n, " x ", k_dim));
        expect(!choose_thin(projection(num_rows, 151936, 2048)).is_better, "the head");
    }
    expect(!choose_thin(projection(8192, 5120, 2048)).is_better, "a prompt");
}

sm80::Config choose_sm80(int64_t num_rows, int64_t num_groups, int64_t n = 4096) {
    return sm80::choose({.num_rows = num_rows,
                         .num_groups = num_groups,
                         .n = n,
                         .k_dim = 2048,
                         .is_gated = true,
                         .num_multiprocessors = 108},
                        40 << 20);
}

template <typename Shape>
void expect_shape_holds(int max_tokens, const std::string& problem) {
    expect(max_tokens % Shape::kTokenStep == 0, problem);
    expect(max_tokens >= Shape::kTokenStep && max_tokens <= Shape::kMaxTokens, problem);
    expect(Shape::ring_bytes(max_tokens) <= sm80::kMostRingBytes, problem);
    expect(Shape::kStages >= 3, problem);
    expect(64 % Shape::BLOCK_K == 0, "all shapes have as many steps along K");
}

void every_sm80_choice_fits_into_any_gpus_shared_memory() {
    for (const int64_t num_groups : {1, 8, 32, 128, 1024}) {
        for (const int64_t n : {8, 256, 4096, 151936}) {
            for (int64_t num_rows = 1; num_rows <= int64_t{1} << 20; num_rows += 1 + num_rows / 7) {
                const std::string problem = concat(num_rows, " rows of ", num_groups, " groups");
                const sm80::Config config = choose_sm80(num_rows, num_groups, n);
                switch (config.tiles) {
                    case sm80::Tiles::kNarrow:
                        expect_shape_holds<sm80::Narrow>(config.max_tokens, problem);
                        break;
                    case sm80::Tiles::kMedium:
                        expect_shape_holds<sm80::Medium>(config.max_tokens, problem);
                        break;
                    case sm80::Tiles::kWide:
                        expect_shape_holds<sm80::Wide>(config.max_tokens, problem);
                        break;
                }
                expect(config.sharing >= 1 && config.sharing <= 16, problem);
            }
        }
    }
}

void sm80_decodes_narrow_and_prefills_wide() {
    for (const auto& [num_experts, top_k] : {std::pair{8, 2}, {128, 8}, {256, 8}, {32, 4}}) {
        expect(choose_sm80(top_k, num_experts).tiles == sm80::Tiles::kNarrow, "T = 1");
        expect(choose_sm80(32 * top_k, num_experts).tiles == sm80::Tiles::kNarrow, "T = 32");
        const sm80::Config prefill = choose_sm80(4096 * top_k, num_experts);
        expect(prefill.tiles == sm80::Tiles::kWide && prefill.max_tokens == 128, "T = 4096");
    }
    expect(choose_sm80(40, 1).tiles == sm80::Tiles::kMedium, "40 rows");
    expect(choose_sm80(4096, 1, 64).tiles == sm80::Tiles::kMedium, "few weight rows");
}

}  // namespace

void add_gemm_config_tests(std::vector<Test>& tests) {
    tests.push_back({"gemm_config: a user names a kernel", a_user_names_a_kernel});
    tests.push_back({"gemm_config: every choice fits into shared memory",
                     every_choice_fits_into_shared_memory});
    tests.push_back({"gemm_config: tiles are slim where that spreads the weights",
                     tiles_are_slim_where_that_spreads_the_weights});
    tests.push_back(
        {"gemm_config: more rows never take a smaller tile", more_rows_never_take_a_smaller_tile});
    tests.push_back({"gemm_config: groups take pairs where those have few tiles more",
                     groups_take_pairs_where_those_have_few_tiles_more});
    tests.push_back({"gemm_config: row tiles that share weights fit into the cache",
                     row_tiles_that_share_weights_fit_into_the_cache});
    tests.push_back({"gemm_config: every thin choice fits into shared memory",
                     every_thin_choice_fits_into_shared_memory});
    tests.push_back({"gemm_config: projections of decode are thin and large ones are not",
                     projections_of_decode_are_thin_and_large_ones_are_not});
    tests.push_back({"gemm_config: every sm80 choice fits into any GPU's shared memory",
                     every_sm80_choice_fits_into_any_gpus_shared_memory});
    tests.push_back({"gemm_config: sm80 decodes narrow and prefills wide",
                     sm80_decodes_narrow_and_prefills_wide});
    tests.push_back({"gemm_config: real models decode narrow and prefill wide",
                     real_models_decode_narrow_and_prefill_wide});
}

}  // namespace moecore::test
