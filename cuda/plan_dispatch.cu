// The plan of a dispatch, before and after its sorts.
//
//   reads   bins: N ids for each of k tokens' choices, from cache; lists: 4 * N numbers
//   writes  bins: 2 * P * T + T * k + N; lists: P * T + 2 * N numbers
//
// One thread a token of a rank, or a number. Latency, not memory. Needs sm_80.

#include "moecore/kernels/plan_dispatch.hpp"

#include <algorithm>

#include "common/launch.cuh"

namespace moecore::cuda {
namespace {

constexpr int kThreads = 128;

/// Calls fn(choice, group, rank) for each of a token's choices that has an owner.
template <typename Fn>
__device__ void for_each_owner(const DispatchBinsArgs& args, const int32_t* ids, Fn&& fn) {
    for (int j = 0; j < args.top_k; ++j) {
        const int id = ids[j];
        if (id < 0 || id >= args.num_experts) continue;
        const int bin = args.bin_of[id];
        fn(j, bin / args.num_ranks, bin % args.num_ranks);
    }
}

__global__ void __launch_bounds__(kThreads)
    dispatch_bins_kernel(const __grid_constant__ DispatchBinsArgs args) {
    wait_for_predecessors();
    allow_dependents();
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= args.num_tokens * args.num_ranks) return;
    const int k = args.top_k, ranks = args.num_ranks;

    // 1. Token i of all, for this rank's experts.
    const int source = static_cast<int>(i / args.num_tokens);
    int first = -1;
    for (int j = 0; j < k; ++j) args.sent_back[i * k + j] = -1;
    for_each_owner(args, args.all_ids + i * k, [&](int j, int group, int owner) {
        if (owner != args.rank) return;
        args.sent_back[i * k + j] = group * ranks + source;
        first = first < 0 ? group : min(first, group);
    });
    args.received[i] = first < 0 ? -1 : first * ranks + source;

    // 2. This rank's token i / P, for the experts of rank i % P.
    const int64_t token = i / ranks;
    const int target = static_cast<int>(i % ranks);
    const int32_t* own = args.all_ids + (args.rank * args.num_tokens + token) * k;
    first = -1;
    if (target == 0)
        for (int j = 0; j < k; ++j) args.received_back[token * k + j] = -1;
    for_each_owner(args, own, [&](int j, int group, int owner) {
        if (target == 0) args.received_back[token * k + j] = group * ranks + owner;
        if (owner == target) first = first < 0 ? group : min(first, group);
    });
    args.sent[i] = first < 0 ? -1 : first * ranks + target;
}

__global__ void __launch_bounds__(kThreads)
    dispatch_lists_kernel(const __grid_constant__ DispatchListsArgs args) {
    wait_for_predecessors();
    allow_dependents();
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int k = args.top_k;
    const int64_t num_pairs = args.num_tokens * args.num_ranks;
    if (i < num_pairs) {
        const int32_t pair = args.sorted_sent[i];
        args.sent_tokens[i] = pair < 0 ? -1 : pair / args.num_ranks;
    }
    if (i < num_pairs * k) {
        const int32_t slot = args.sorted_rows[i];
        args.sorted_slots[i] = slot < 0 ? -1 : args.copy_of_token[slot / k] * k + slot % k;
        const int32_t back = args.sorted_sent_back[i];
        args.back_rows[i] = back < 0 ? -1 : args.row_of_slot[back];
    }
    const int width = args.num_local_experts + 1;
    if (i < int64_t{args.num_groups} * width) {
        const auto first_of = [&](int group) {
            const int64_t expert = int64_t{args.num_local_experts} * group / args.num_groups;
            return args.expert_offsets[expert];
        };
        const int group = static_cast<int>(i / width);
        const int64_t offset = args.expert_offsets[i % width];
        args.group_offsets[i] = min(max(offset, first_of(group)), first_of(group + 1));
    }
}

template <typename Args>
void launch(const char* op, void (*kernel)(Args), const Args& args, int64_t count, Stream stream) {
    const auto blocks = static_cast<unsigned>(ceil_div(count, int64_t{kThreads}));
    launch_dependent(op, kernel, dim3(blocks), dim3(kThreads), 0, stream, args);
}

}  // namespace

void dispatch_bins(const DispatchBinsArgs& args, Stream stream) {
    launch("dispatch_bins", dispatch_bins_kernel, args, args.num_tokens * args.num_ranks, stream);
}

void dispatch_lists(const DispatchListsArgs& args, Stream stream) {
    const int64_t count =
        std::max(args.num_tokens * args.num_ranks * args.top_k,
                 int64_t{args.num_groups} * (int64_t{args.num_local_experts} + 1));
    launch("dispatch_lists", dispatch_lists_kernel, args, count, stream);
}

}  // namespace moecore::cuda
