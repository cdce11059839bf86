#include "moecore/kernels/route_and_sort.hpp"

namespace moecore::cpu {

void route_and_sort(const RouteAndSortArgs& args) {
    topk_routing(args.routing);
    sort_by_expert(args.sort);
}

}  // namespace moecore::cpu
