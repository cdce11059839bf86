#include <algorithm>

#include "moecore/expert_parallel.hpp"
#include "moecore/threads.hpp"
#include "ranks.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

using ChooseExpert = std::function<int64_t(Random&)>;

int64_t any_expert(Random& random) { return random.below(8); }

/// Ways in which tokens choose among the experts of `size` ranks.
std::vector<ChooseExpert> skews(int num_experts, int size) {
    return {
        [=](Random& random) { return random.below(num_experts); },
        [=](Random& random) {  // odds fall like a power of the expert's number
            const int64_t most = random.below(1 + random.below(1 + random.below(3 * num_experts)));
            return std::min<int64_t>(num_experts - 1, most);
        },
        [=](Random&) -> int64_t { return 5 % num_experts; },
        [=](Random& random) {  // only the first rank has work
            return random.below(expert_range(num_experts, 0, size).count);
        },
        [=](Random& random) {  // many slots without an expert
            return random.below(3) == 0 ? random.below(num_experts) : -1;
        },
    };
}

/// One rank's end of a group that lives for several layers.
struct Rank {
    ExpertParallel group;
    Workspace workspace{Device{}, 0};
    explicit Rank(Transport& transport) : group(transport) {}

    void run(WholeLayer& whole, const ExpertParallelConfig& how, RankTokens& tokens) {
        const ExpertRange range =
            expert_range(whole.sizes().experts, group.transport().rank(), group.transport().size());
        const MoELayer layer(whole.config(range), whole.weights(range), group, how);
        tokens.run(layer, workspace);
    }
};

/// `counts`: tokens of each rank. Every rank's output must have the bits of one rank alone.
void expect_same_bits(Transports transports, const EpSizes& sizes,
                      const std::vector<int64_t>& counts, const ExpertParallelConfig& how,
                      const ChooseExpert& choose = any_expert) {
    WholeLayer whole(sizes);
    std::vector<RankTokens> tokens;
    std::vector<std::vector<unsigned char>> wanted;
    for (size_t r = 0; r < counts.size(); ++r) {
        tokens.emplace_back(sizes, counts[r], static_cast<uint32_t>(r) + 11, choose);
        wanted.push_back(tokens.back().expected(whole));
        tokens.back().output.fill(7.0);
    }
    set_num_threads(1);
    run_all_ranks(static_cast<int>(counts.size()), [&](int rank) {
        const auto r = static_cast<size_t>(rank);
        Rank end(*transports[r]);
        for (int repeat = 0; repeat < 2; ++repeat) end.run(whole, how, tokens[r]);
    });
    for (size_t r = 0; r < counts.size(); ++r)
        expect(tokens[r].output.bytes() == wanted[r],
               concat("rank ", r, " of ", counts.size(), " has other bits"));
}

/// Threads, which write to each other's memory, and ranks that send and receive.
const std::pair<const char*, Transports (*)(int)> kKinds[] = {
    {"in process", [](int size) { return make_in_process_transports(size); }},
    {"shm", [](int size) { return shm_transports(size); }},
};

void exact_has_the_bits_of_one_rank() {
    for (const DType dtype : {kF32, kBf16})
        for (const int64_t shared : {0, 12}) {
            const EpSizes sizes{.shared = shared, .dtype = dtype};
            expect_same_bits(loopback_transports(), sizes, {9}, {});
            for (const auto& [name, make] : kKinds) {
                expect_same_bits(make(2), sizes, {5, 3}, {});
                expect_same_bits(make(3), sizes, {4, 0, 17}, {});
                expect_same_bits(make(8), sizes, {1, 2, 3, 0, 5, 6, 7, 40}, {});
            }
        }
}

void bits_do_not_depend_on_groups_or_schedule() {
    const EpSizes sizes{.shared = 12, .experts = 11};
    for (const auto& [name, make] : kKinds) {
        for (const int groups : {1, 2, 3, 4, 7, 64})
            expect_same_bits(make(3), sizes, {6, 0, 9},
                             {.schedule = Schedule::kAllToAll, .num_groups = groups});
        for (const int64_t fixed : {0, 9, 16})
            expect_same_bits(make(3), sizes, {6, 0, 9},
                             {.schedule = Schedule::kAllGather, .fixed_tokens = fixed});
        expect_same_bits(make(2), {}, {0, 0}, {.schedule = Schedule::kAllGather});
    }
}

void tokens_can_be_fixed_for_all_layers() {
    WholeLayer whole(EpSizes{.shared = 12});
    for (const auto& [name, make] : kKinds) {
        Transports transports = make(2);
        std::vector<RankTokens> tokens;
        std::vector<std::vector<unsigned char>> wanted;
        for (uint32_t r = 0; r < 2; ++r) {
            tokens.emplace_back(whole.sizes(), 5 + r, r, any_expert);
            wanted.push_back(tokens.back().expected(whole));
        }
        run_all_ranks(2, [&](int rank) {
            const auto r = static_cast<size_t>(rank);
            Rank end(*transports[r]);
            const ExpertParallelConfig how{.schedule = Schedule::kAllToAll, .num_groups = 2};
            for (const int64_t fixed : {8, 16, 8, 0})
                for (int repeat = 0; repeat < 3; ++repeat) {
                    end.group.fix_tokens(fixed);
                    tokens[r].output.fill(7.0);
                    end.run(whole, how, tokens[r]);
                    expect(tokens[r].output.bytes() == wanted[r], concat("F = ", fixed));
                    const bool is_all_to_all =
                        end.group.last_choice().schedule == Schedule::kAllToAll;
                    expect(is_all_to_all == (fixed == 0), end.group.last_choice().reason);
                }
            expect_invalid([&] { end.group.fix_tokens(-1); }, "fixed_tokens must be >= 0, got -1");
        });
    }
}

void skewed_routes_have_the_same_bits() {
    for (const Schedule schedule : {Schedule::kAllToAll, Schedule::kAllGather}) {
        const ExpertParallelConfig how{.schedule = schedule};
        for (const ChooseExpert& choose : skews(8, 4)) {
            expect_same_bits(loopback_transports(), {}, {33}, how, choose);
            expect_same_bits(make_in_process_transports(4), {}, {33, 1, 0, 64}, how, choose);
            expect_same_bits(shm_transports(4, 256), {}, {33, 1, 0, 64}, how, choose);
        }
    }
}

/// Layers of random sizes, groups, tokens and skew, one after another over the same transports.
void random_layers(Transports transports, int num_layers, uint32_t seed) {
    const int size = static_cast<int>(transports.size());
    std::vector<std::unique_ptr<Rank>> ends;
    for (auto& transport : transports) ends.push_back(std::make_unique<Rank>(*transport));
    set_num_threads(1);
    for (int i = 0; i < num_layers; ++i) {
        Random random(seed + static_cast<uint32_t>(i));
        EpSizes sizes{.hidden = 1 + random.below(40), .inner = 1 + random.below(20)};
        sizes.experts = size + static_cast<int>(random.below(9));
        sizes.top_k = 1 + static_cast<int>(random.below(std::min(sizes.experts, 4)));
        sizes.shared = random.below(2) * 5;
        sizes.dtype = random.below(2) == 0 ? kF32 : kBf16;
        ExpertParallelConfig how{.num_groups = static_cast<int>(random.below(4))};
        constexpr Schedule kSchedules[] = {Schedule::kAllToAll, Schedule::kAllGather,
                                           Schedule::kAuto};
        how.schedule = kSchedules[std::max<int64_t>(0, random.below(5) - 2)];
        WholeLayer whole(sizes, seed);
        const std::vector<ChooseExpert> ways = skews(sizes.experts, size);
        const size_t way = static_cast<size_t>(random.below(static_cast<int64_t>(ways.size())));
        const ChooseExpert& choose = ways[way];
        std::vector<RankTokens> tokens;
        std::vector<std::vector<unsigned char>> wanted;
        for (int r = 0; r < size; ++r) {
            const int64_t count = random.below(4) == 0 ? 0 : random.below(12);
            tokens.emplace_back(sizes, count, static_cast<uint32_t>(i * 64 + r), choose);
            wanted.push_back(tokens.back().expected(whole));
            tokens.back().output.fill(7.0);
        }
        run_all_ranks(size, [&](int rank) {
            const auto r = static_cast<size_t>(rank);
            ends[r]->run(whole, how, tokens[r]);
        });
        for (size_t r = 0; r < tokens.size(); ++r)
            expect(tokens[r].output.bytes() == wanted[r], concat("layer ", i, " rank ", r));
    }
}

void a_thousand_random_layers_in_process() {
    random_layers(make_in_process_transports(3), 1000, 100);
}

void a_thousand_random_layers_over_shared_memory() {
    random_layers(shm_transports(3, 256), 1000, 5000);
}

void a_thousand_random_layers_alone() { random_layers(loopback_transports(), 1000, 9000); }

void fast_is_close_to_exact() {
    const EpSizes sizes{.shared = 12, .top_k = 3, .dtype = kF32};
    WholeLayer whole(sizes);
    for (const auto& [name, make] : kKinds) {
        Transports transports = make(3);
        std::vector<RankTokens> tokens;
        std::vector<Array> wanted;
        for (uint32_t r = 0; r < 3; ++r) {
            tokens.emplace_back(sizes, r * 5, r, any_expert);
            tokens.back().expected(whole);
            wanted.push_back(tokens.back().output);
        }
        run_all_ranks(3, [&](int rank) {
            const auto r = static_cast<size_t>(rank);
            Rank end(*transports[r]);
            for (const int groups : {1, 3})
                end.run(whole, {.combine = CombineMode::kFast, .num_groups = groups}, tokens[r]);
        });
        // Partial sums of at most four terms below 32, each rounded in another order.
        for (size_t r = 0; r < 3; ++r)
            for (int64_t i = 0; i < wanted[r].size(); ++i)
                expect_close(tokens[r].output[i], wanted[r][i], 8 * 32 * kEps, kF32,
                             concat("rank ", r));
    }
}

/// All ranks fail with `text`, blaming `culprit`; with another rank's sizes or mistakes.
void expect_group_fails(int culprit, const std::string& text,
                        const std::function<void(Rank&, int)>& body) {
    Transports transports = make_in_process_transports(3);
    const auto errors = run_ranks(3, [&](int rank) {
        Rank end(*transports[static_cast<size_t>(rank)]);
        body(end, rank);
    });
    for (int rank = 0; rank < 3; ++rank) {
        const Failure failure = failure_of(errors[static_cast<size_t>(rank)]);
        expect(failure.text.find(text) != std::string::npos &&
                   (failure.culprit == culprit || (rank == culprit && failure.culprit == -2)),
               concat("rank ", rank, " wanted '", text, "', got '", failure.text, "' of ",
                      failure.culprit));
    }
}

void other_models_are_noticed() {
    EpSizes sizes;
    WholeLayer whole(sizes);
    sizes.hidden = 32;
    WholeLayer wider(sizes);
    expect_group_fails(1, "rank 1 differs in hidden_size", [&](Rank& end, int rank) {
        WholeLayer& own = rank == 1 ? wider : whole;
        RankTokens tokens(own.sizes(), 4, 1, any_expert);
        end.run(own, {}, tokens);
    });
    expect_group_fails(2, "rank 2 differs in num_groups", [&](Rank& end, int rank) {
        RankTokens tokens(whole.sizes(), 4, 1, any_expert);
        end.run(whole, {.num_groups = rank == 2 ? 2 : 1}, tokens);
    });
    expect_group_fails(1, "rank 1 must own the experts from 2 on, got 3", [&](Rank& end, int rank) {
        const ExpertRange range{3 * rank, rank == 1 ? 3 : 2};
        const MoELayer layer(whole.config(range), whole.weights(range), end.group);
        RankTokens tokens(whole.sizes(), 4, 1, any_expert);
        tokens.run(layer, end.workspace);
    });
}

void a_mistake_on_one_rank_ends_all() {
    WholeLayer whole(EpSizes{});
    expect_group_fails(1, "MoELayer: hidden_states must have", [&](Rank& end, int rank) {
        const ExpertRange range = expert_range(8, rank, 3);
        const MoELayer layer(whole.config(range), whole.weights(range), end.group);
        RankTokens tokens(whole.sizes(), 4, 1, any_expert);
        Workspace workspace({}, layer.workspace_bytes(4));
        layer.forward_routed(tokens.hidden.view({4, rank == 1 ? 12 : 24}), tokens.ids.view({4, 2}),
                             tokens.weights.view({4, 2}), tokens.output.view({4, 24}), workspace);
    });
}

void phases_are_traced() {
    WholeLayer whole(EpSizes{.shared = 12});
    for (const auto& [name, make] : kKinds) {
        const bool sends = std::string(name) == "shm";
        Transports transports = make(2);
        run_all_ranks(2, [&](int rank) {
            Rank end(*transports[static_cast<size_t>(rank)]);
            RankTokens tokens(whole.sizes(), 4, 1, any_expert);
            end.group.measure();
            end.group.start_trace();
            end.run(whole, {.schedule = Schedule::kAllToAll, .num_groups = 2}, tokens);
            int64_t spans = 0;
            for (const PhaseTime& phase : end.group.phase_times()) spans += phase.count;
            // plan, shared expert, combine; experts of two groups; dispatch and return, of two
            // groups where rows are sent.
            expect(spans == (sends ? 9 : 7), concat("spans: ", spans));
            const std::string events = end.group.trace_events();
            const char* last = sends ? "\"name\":\"return 1\"" : "\"name\":\"return\"";
            expect(events.find(last) != std::string::npos, events);
            expect(end.group.figures().link_gbps > 0.01, "a measured link");
        });
    }
}

void arguments_are_checked() {
    WholeLayer whole(EpSizes{});
    const auto transport = make_loopback_transport();
    ExpertParallel group(*transport);
    const auto layer = [&](const ExpertParallelConfig& how) {
        return MoELayer(whole.config(), whole.weights(), group, how);
    };
    expect_invalid([&] { layer({.num_groups = 65}); }, "num_groups must be in [0, 64], got 65");
    expect_invalid([&] { layer({.fixed_tokens = 4}); },
                   "fixed_tokens must come with the all-gather schedule");
    expect_invalid(
        [&] { layer({.combine = CombineMode::kFast, .schedule = Schedule::kAllGather}); },
        "combine must be exact");
    RankTokens tokens(whole.sizes(), 5, 1, any_expert);
    Workspace workspace({}, 0);
    expect_invalid(
        [&] {
            tokens.run(layer({.schedule = Schedule::kAllGather, .fixed_tokens = 4}), workspace);
        },
        "hidden_states must have at most fixed_tokens = 4 rows, got 5");
}

}  // namespace

void add_expert_parallel_tests(std::vector<Test>& tests) {
    tests.push_back({"exact has the bits of one rank", exact_has_the_bits_of_one_rank});
    tests.push_back({"bits and groups", bits_do_not_depend_on_groups_or_schedule});
    tests.push_back({"tokens fixed for all layers", tokens_can_be_fixed_for_all_layers});
    tests.push_back({"skewed routes", skewed_routes_have_the_same_bits});
    tests.push_back({"1000 layers in process", a_thousand_random_layers_in_process});
    tests.push_back({"1000 layers over shm", a_thousand_random_layers_over_shared_memory});
    tests.push_back({"1000 layers alone", a_thousand_random_layers_alone});
    tests.push_back({"fast is close to exact", fast_is_close_to_exact});
    tests.push_back({"other models are noticed", other_models_are_noticed});
    tests.push_back({"a mistake on one rank ends all", a_mistake_on_one_rank_ends_all});
    tests.push_back({"phases are traced", phases_are_traced});
    tests.push_back({"expert parallel arguments", arguments_are_checked});
}

}  // namespace moecore::test
