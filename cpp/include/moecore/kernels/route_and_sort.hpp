#pragma once

#include "moecore/kernels/sort_by_expert.hpp"
#include "moecore/kernels/topk_routing.hpp"

namespace moecore {

/// What every route_and_sort kernel takes. Built and checked by ops/route_and_sort.cpp.
struct RouteAndSortArgs {
    TopkRoutingArgs routing;
    SortByExpertArgs sort;  ///< of routing.topk_ids
};

namespace cpu {
void route_and_sort(const RouteAndSortArgs& args);
}
namespace cuda {
void route_and_sort(const RouteAndSortArgs& args, Stream stream);
}

}  // namespace moecore
