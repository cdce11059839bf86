#include "runtime/agreement.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "moecore/error.hpp"

namespace moecore {
namespace {

constexpr const char* kPhase = "agree on routes";
constexpr size_t kInlineBytes = 2048;  ///< of routes, in the first exchange

/// The beginning of a layer, as each rank tells it.
struct Hello {
    // The same on every rank.
    int64_t call, hidden_size, intermediate_size, num_experts, top_k, dtype, combine, num_groups;
    // Its own.
    int64_t first_expert, num_local_experts, num_tokens;
    char routes[kInlineBytes];
};

constexpr std::pair<const char*, int64_t Hello::*> kCommon[] = {
    {"number of layer calls", &Hello::call},
    {"hidden_size", &Hello::hidden_size},
    {"intermediate_size", &Hello::intermediate_size},
    {"num_experts", &Hello::num_experts},
    {"top_k", &Hello::top_k},
    {"dtype", &Hello::dtype},
    {"combine", &Hello::combine},
    {"num_groups", &Hello::num_groups},
};

[[noreturn]] void fail(Transport& transport, int culprit, const std::string& what) {
    const std::string message =
        concat(what,
               ". All ranks must load the same model with the same options, and split its "
               "experts in the order of ranks; every rank needs a new transport.");
    transport.abort(message);
    throw TransportError(culprit, kPhase, message);
}

/// All ranks see the same hellos and come to the same conclusion.
void check_hellos(Transport& transport, const std::vector<Hello>& hellos) {
    const Hello& first = hellos[0];
    int64_t next_expert = 0;
    for (size_t r = 0; r < hellos.size(); ++r) {
        const Hello& hello = hellos[r];
        for (const auto& [name, field] : kCommon)
            if (hello.*field != first.*field)
                fail(transport, static_cast<int>(r),
                     concat("rank ", r, " differs in ", name, " in phase '", kPhase, "': it has ",
                            hello.*field, ", rank 0 has ", first.*field));
        if (hello.first_expert != next_expert)
            fail(transport, static_cast<int>(r),
                 concat("rank ", r, " must own the experts from ", next_expert, " on, got ",
                        hello.first_expert, " in phase '", kPhase, "'"));
        next_expert += hello.num_local_experts;
    }
    if (next_expert != first.num_experts)
        fail(transport, static_cast<int>(hellos.size()) - 1,
             concat("the ranks must own all ", first.num_experts, " experts, got ", next_expert,
                    " in phase '", kPhase, "'"));
}

/// One rank's routes: ids [T, k], then weights if they are wanted.
void pack_routes(const int32_t* ids, const float* weights, size_t num_slots, bool with_weights,
                 char* target) {
    if (num_slots == 0) return;
    std::memcpy(target, ids, num_slots * sizeof *ids);
    if (with_weights)
        std::memcpy(target + num_slots * sizeof *ids, weights, num_slots * sizeof *weights);
}

}  // namespace

Agreement agree(Transport& transport, const MoEConfig& config, const ExpertParallelConfig& how,
                int64_t call, const int32_t* topk_ids, const float* topk_weights,
                int64_t num_tokens) {
    const auto top_k = static_cast<size_t>(config.routing.top_k);
    const bool with_weights = how.combine == CombineMode::kFast;
    const size_t slot_bytes = sizeof(int32_t) + (with_weights ? sizeof(float) : 0);
    const auto num_slots = static_cast<size_t>(num_tokens) * top_k;
    Hello mine{.call = call,
               .hidden_size = config.hidden_size,
               .intermediate_size = config.intermediate_size,
               .num_experts = config.num_experts,
               .top_k = config.routing.top_k,
               .dtype = static_cast<int64_t>(config.dtype),
               .combine = static_cast<int64_t>(how.combine),
               .num_groups = how.num_groups,
               .first_expert = config.first_expert,
               .num_local_experts = config.num_local_experts,
               .num_tokens = num_tokens};
    if (num_slots * slot_bytes <= kInlineBytes)
        pack_routes(topk_ids, topk_weights, num_slots, with_weights, mine.routes);
    std::vector<Hello> hellos(static_cast<size_t>(transport.size()));
    transport.all_gather(kPhase, &mine, hellos.data(), sizeof mine);
    check_hellos(transport, hellos);

    Agreement result;
    size_t stride = kInlineBytes;
    for (const Hello& hello : hellos) {
        stride = std::max(stride, static_cast<size_t>(hello.num_tokens) * top_k * slot_bytes);
        result.num_tokens.push_back(hello.num_tokens);
        result.ranges.push_back(
            {static_cast<int>(hello.first_expert), static_cast<int>(hello.num_local_experts)});
    }
    result.bytes.resize(stride * hellos.size());
    if (stride > kInlineBytes) {
        std::vector<char> routes(stride);
        pack_routes(topk_ids, topk_weights, num_slots, with_weights, routes.data());
        transport.all_gather("exchange routes", routes.data(), result.bytes.data(), stride);
    } else {
        for (size_t r = 0; r < hellos.size(); ++r)
            std::memcpy(result.bytes.data() + r * stride, hellos[r].routes, stride);
    }
    for (size_t r = 0; r < hellos.size(); ++r) {
        const char* routes = result.bytes.data() + r * stride;
        const size_t count = static_cast<size_t>(hellos[r].num_tokens) * top_k;
        result.ids.emplace_back(reinterpret_cast<const int32_t*>(routes), count);
        if (with_weights)
            result.weights.emplace_back(
                reinterpret_cast<const float*>(routes + count * sizeof(int32_t)), count);
    }
    return result;
}

}  // namespace moecore
