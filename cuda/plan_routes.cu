// What travels between ranks, from every rank's routes: keys to sort by, and rows from the orders.
//
//   reads   P F k * 4 bytes of ids (key_routes); 3 P F k * 4 of orders (place_rows)
//   writes  P F (k + 1) + T (P + k) keys of 4 bytes; 2 P F k rows of 4 bytes, and the copies' k
//           rows and weights where they are added before they return
//
// One thread a token, then one a slot. Needs sm_80.

#include <algorithm>
#include <cstdint>

#include "common/launch.cuh"
#include "moecore/kernels/plan_routes.hpp"

namespace moecore::cuda {
namespace {

constexpr int kThreads = 128;

__device__ int32_t smaller_key(int32_t known, int32_t key) {
    return known < 0 ? key : min(known, key);
}

__global__ void __launch_bounds__(kThreads)
    key_routes_kernel(const __grid_constant__ KeyRoutesArgs args) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (at >= args.num_ranks * args.tokens_per_rank) return;
    const auto source = static_cast<int32_t>(at / args.tokens_per_rank);
    const int64_t token = at % args.tokens_per_rank;
    const bool is_own = source == args.rank && token < args.num_tokens;
    int32_t* sent = args.sent_keys + token * args.num_ranks;
    if (is_own)
        for (int r = 0; r < args.num_ranks; ++r) sent[r] = -1;
    int32_t copy = -1;
    for (int j = 0; j < args.top_k; ++j) {
        const int32_t id = args.all_ids[at * args.top_k + j];
        const int32_t place = id >= 0 && id < args.num_experts ? args.places[id] : -1;
        const int32_t owner = place < 0 ? -1 : place % args.num_ranks;
        const int32_t back = owner == args.rank ? place - owner + source : -1;
        args.sent_back_keys[at * args.top_k + j] = back;
        if (back >= 0) copy = smaller_key(copy, back);
        if (!is_own) continue;
        args.received_back_keys[token * args.top_k + j] = place;
        if (owner >= 0) sent[owner] = smaller_key(sent[owner], place);
    }
    args.received_keys[at] = copy;
}

__device__ int64_t group_bound(const PlaceRowsArgs& args, int64_t group) {
    return args.expert_offsets[args.num_local_experts * group / args.num_groups];
}

__global__ void __launch_bounds__(kThreads)
    place_rows_kernel(const __grid_constant__ PlaceRowsArgs args) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int k = args.top_k;
    if (i < args.num_slots) {
        const int32_t slot = args.row_slots[i], back = args.back_slots[i];
        args.sorted_slots[i] = slot < 0 ? -1 : args.token_copies[slot / k] * k + slot % k;
        args.back_rows[i] = back < 0 ? -1 : args.slot_rows[back];
        const int64_t copy = args.all_weights == nullptr ? -1 : args.token_copies[i / k];
        if (copy >= 0) {
            args.copy_rows[copy * k + i % k] = args.slot_rows[i];
            args.copy_weights[copy * k + i % k] = args.all_weights[i];
        }
    }
    if (i < args.num_items) {
        const int32_t item = args.sent_items[i];
        args.sent_tokens[i] = item < 0 ? -1 : item / args.num_ranks;
        if (args.all_weights != nullptr) args.ones[i] = 1.0f;
    }
    const int64_t width = args.num_local_experts + 1;
    if (i < args.num_groups * width) {
        const int64_t offset = args.expert_offsets[i % width];
        const int64_t first = group_bound(args, i / width), last = group_bound(args, i / width + 1);
        args.group_offsets[i] = min(max(offset, first), last);
    }
}

unsigned blocks_for(int64_t count) {
    return static_cast<unsigned>(ceil_div(count, int64_t{kThreads}));
}

}  // namespace

void key_routes(const KeyRoutesArgs& args, Stream stream) {
    const int64_t tokens = args.num_ranks * args.tokens_per_rank;
    if (tokens == 0) return;  // a grid of 0 blocks is a launch error
    key_routes_kernel<<<blocks_for(tokens), kThreads, 0, native(stream)>>>(args);
    check(cudaPeekAtLastError(), "key_routes launch");
}

void place_rows(const PlaceRowsArgs& args, Stream stream) {
    const int64_t offsets = int64_t{args.num_groups} * (args.num_local_experts + 1);
    const int64_t count = std::max({args.num_slots, args.num_items, offsets});
    if (count == 0) return;
    place_rows_kernel<<<blocks_for(count), kThreads, 0, native(stream)>>>(args);
    check(cudaPeekAtLastError(), "place_rows launch");
}

}  // namespace moecore::cuda
