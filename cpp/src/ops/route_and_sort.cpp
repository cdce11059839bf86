#include "moecore/route_and_sort.hpp"

#include "moecore/kernels/memory.hpp"
#include "moecore/kernels/route_and_sort.hpp"
#include "ops/routing.hpp"

namespace moecore {

void route_and_sort(const TensorView& router_logits, const TensorView& selection_bias,
                    const RoutingConfig& config, int64_t first_expert, const TensorView& topk_ids,
                    const TensorView& topk_weights, const TensorView& sorted_slots,
                    const TensorView& slot_to_row, const TensorView& expert_offsets,
                    Stream stream) {
    constexpr const char* kOp = "route_and_sort";
    const Check check(kOp);
    const RouteAndSortArgs args{
        .routing = checked_topk_routing(check, kOp, router_logits, selection_bias, config, topk_ids,
                                        topk_weights),
        .sort = checked_sort_by_expert(check, topk_ids, first_expert, sorted_slots, slot_to_row,
                                       expert_offsets),
    };
    check.that(first_expert + args.sort.num_local_experts <= args.routing.num_experts,
               "first_expert and expert_offsets must give a range within the ",
               args.routing.num_experts, " experts of router_logits, got ", first_expert, " and ",
               args.sort.num_local_experts, " experts");
    for (const auto& [name, view] :
         {std::pair{"sorted_slots", &sorted_slots}, std::pair{"slot_to_row", &slot_to_row},
          std::pair{"expert_offsets", &expert_offsets}}) {
        check.no_overlap(name, *view, "router_logits", router_logits);
        check.no_overlap(name, *view, "selection_bias", selection_bias);
        check.no_overlap(name, *view, "topk_weights", topk_weights);
    }
    switch (router_logits.device.type) {
        case DeviceType::kCpu:
            return cpu::route_and_sort(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(router_logits.device.index);
            return cuda::route_and_sort(args, stream);
        }
    }
}

}  // namespace moecore
