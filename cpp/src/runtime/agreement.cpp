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
    int64_t call, hidden_size, intermediate_size, num_experts, top_k, dtype, combine, schedule,
        num_groups, fixed_tokens;
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
    {"schedule", &Hello::schedule},
    {"num_groups", &Hello::num_groups},
    {"fixed_tokens", &Hello::fixed_tokens},
};

[[noreturn]] void fail(int culprit, const std::string& what) {
    throw TransportError(
        culprit, kPhase,
        concat(what,
               ". All ranks must load the same model with the same options, and split its "
               "experts in the order of ranks; every rank needs a new transport."));
}

/// All ranks see the same hellos and come to the same conclusion.
void check_hellos(const std::vector<Hello>& hellos) {
    const Hello& first = hellos[0];
    int64_t next_expert = 0;
    for (size_t r = 0; r < hellos.size(); ++r) {
        const Hello& hello = hellos[r];
        for (const auto& [name, field] : kCommon)
            if (hello.*field != first.*field)
                fail(static_cast<int>(r),
                     concat("rank ", r, " differs in ", name, " in phase '", kPhase, "': it has ",
                            hello.*field, ", rank 0 has ", first.*field));
        if (hello.first_expert != next_expert)
            fail(static_cast<int>(r),
                 concat("rank ", r, " must own the experts from ", next_expert, " on, got ",
                        hello.first_expert, " in phase '", kPhase, "'"));
        next_expert += hello.num_local_experts;
    }
    if (next_expert != first.num_experts)
        fail(static_cast<int>(hellos.size()) - 1,
             concat("the ranks must own all ", first.num_experts, " experts, got ", next_expert,
                    " in phase '", kPhase, "'"));
}

/// How one rank's routes lie in an exchange: ids [T, k], then weights [T, k] if they are wanted.
struct RouteLayout {
    size_t top_k;
    bool with_weights;

    size_t bytes(int64_t num_tokens) const {
        return count(num_tokens) * (sizeof(int32_t) + (with_weights ? sizeof(float) : 0));
    }
    size_t count(int64_t num_tokens) const { return static_cast<size_t>(num_tokens) * top_k; }

    void pack(const HostRoutes& routes, int64_t num_tokens, char* target) const {
        const size_t id_bytes = count(num_tokens) * sizeof(int32_t);
        if (id_bytes == 0) return;
        std::memcpy(target, routes.topk_ids, id_bytes);
        if (with_weights)
            std::memcpy(target + id_bytes, routes.topk_weights, bytes(num_tokens) - id_bytes);
    }

    /// Makes the spans of `agreement` view its bytes, `stride` for each rank.
    void unpack(size_t stride, Agreement& agreement) const {
        for (size_t r = 0; r < agreement.num_tokens.size(); ++r) {
            const char* routes = agreement.bytes.data() + r * stride;
            const size_t slots = count(agreement.num_tokens[r]);
            agreement.ids.emplace_back(reinterpret_cast<const int32_t*>(routes), slots);
            if (with_weights)
                agreement.weights.emplace_back(
                    reinterpret_cast<const float*>(routes + slots * sizeof(int32_t)), slots);
        }
    }
};

RouteLayout layout_of(const MoEConfig& config, const ExpertParallelConfig& how) {
    return {static_cast<size_t>(config.routing.top_k), how.combine == CombineMode::kFast};
}

}  // namespace

Agreement agree(Transport& transport, const MoEConfig& config, const ExpertParallelConfig& how,
                int64_t call, int64_t num_tokens, const HostRoutes* routes) {
    const RouteLayout layout = layout_of(config, how);
    Hello mine{.call = call,
               .hidden_size = config.hidden_size,
               .intermediate_size = config.intermediate_size,
               .num_experts = config.num_experts,
               .top_k = config.routing.top_k,
               .dtype = static_cast<int64_t>(config.dtype),
               .combine = static_cast<int64_t>(how.combine),
               .schedule = static_cast<int64_t>(how.schedule),
               .num_groups = how.num_groups,
               .fixed_tokens = how.fixed_tokens,
               .first_expert = config.first_expert,
               .num_local_experts = config.num_local_experts,
               .num_tokens = num_tokens};
    if (routes != nullptr && layout.bytes(num_tokens) <= kInlineBytes)
        layout.pack(*routes, num_tokens, mine.routes);
    std::vector<Hello> hellos(static_cast<size_t>(transport.size()));
    transport.all_gather(kPhase, &mine, hellos.data(), sizeof mine);
    check_hellos(hellos);

    Agreement result;
    bool all_inline = routes != nullptr;
    for (const Hello& hello : hellos) {
        all_inline = all_inline && layout.bytes(hello.num_tokens) <= kInlineBytes;
        result.num_tokens.push_back(hello.num_tokens);
        result.ranges.push_back(
            {static_cast<int>(hello.first_expert), static_cast<int>(hello.num_local_experts)});
    }
    if (all_inline) {
        result.bytes.resize(hellos.size() * kInlineBytes);
        for (size_t r = 0; r < hellos.size(); ++r)
            std::memcpy(result.bytes.data() + r * kInlineBytes, hellos[r].routes, kInlineBytes);
        layout.unpack(kInlineBytes, result);
    }
    return result;
}

void exchange_routes(Transport& transport, const MoEConfig& config, const ExpertParallelConfig& how,
                     const HostRoutes& routes, Agreement& agreement) {
    if (agreement.has_routes()) return;
    const RouteLayout layout = layout_of(config, how);
    size_t stride = 0;
    for (const int64_t tokens : agreement.num_tokens)
        stride = std::max(stride, layout.bytes(tokens));
    std::vector<char> mine(stride);
    layout.pack(routes, agreement.num_tokens[static_cast<size_t>(transport.rank())], mine.data());
    agreement.bytes.resize(stride * agreement.num_tokens.size());
    transport.all_gather("exchange routes", mine.data(), agreement.bytes.data(), stride);
    layout.unpack(stride, agreement);
}

}  // namespace moecore
