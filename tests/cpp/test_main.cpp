#include "test_main.hpp"

#include <exception>
#include <iostream>
#include <stdexcept>

#include "moecore/build_info.hpp"
#include "moecore/threads.hpp"

namespace moecore::test {

void expect(bool condition, const std::string& message, std::source_location where) {
    if (!condition)
        throw std::runtime_error(concat(where.file_name(), ":", where.line(), ": ", message));
}

}  // namespace moecore::test

/// Runs all tests, or those whose name contains the first argument.
int main(int argc, char** argv) {
    using namespace moecore;
    std::vector<test::Test> tests;
    test::add_topk_routing_tests(tests);
    test::add_route_and_sort_tests(tests);
    test::add_sort_by_expert_tests(tests);
    test::add_grouped_gemm_tests(tests);
    test::add_gemm_amx_tests(tests);
    test::add_gemm_config_tests(tests);
    test::add_grouped_gemm_argument_tests(tests);
    test::add_packed_files_tests(tests);
    test::add_packed_weights_tests(tests);
    test::add_combine_tests(tests);
    test::add_decoder_layer_tests(tests);
    test::add_draw_tokens_tests(tests);
    test::add_dispatch_plan_tests(tests);
    test::add_embedding_tests(tests);
    test::add_expert_parallel_tests(tests);
    test::add_ep_schedule_tests(tests);
    test::add_gather_rows_tests(tests);
    test::add_transport_tests(tests);
    test::add_lent_memory_tests(tests);
    test::add_moe_layer_tests(tests);
    test::add_norm_and_rotate_tests(tests);
    test::add_paged_attention_tests(tests);
    test::add_rms_norm_tests(tests);
    test::add_rotary_embedding_tests(tests);
    if (argc > 1)
        std::erase_if(tests, [&](const test::Test& test) {
            return test.name.find(argv[1]) == std::string::npos;
        });
    std::cout << "CPU kernels: " << build_info().cpu_isa << "\n";
    int failed = 0;
    for (const test::Test& test : tests) {
        set_num_threads(0);
        try {
            test.run();
        } catch (const std::exception& error) {
            ++failed;
            std::cout << "FAILED " << test.name << "\n  " << error.what() << std::endl;
        }
    }
    std::cout << tests.size() - static_cast<size_t>(failed) << " passed, " << failed << " failed\n";
    return failed == 0 ? 0 : 1;
}
