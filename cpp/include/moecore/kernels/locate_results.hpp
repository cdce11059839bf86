#pragma once

#include <cstdint>

#include "moecore/stream.hpp"

namespace moecore {

/// What every locate_results kernel takes. Built and checked by ops/locate_results.cpp.
struct LocateResultsArgs {
    const int32_t* topk_ids;       ///< [S]
    const int32_t* first_experts;  ///< [P + 1], non-decreasing
    int32_t* output;               ///< [S], out
    int64_t num_slots;             ///< S >= 0; P * S < 2^31
    int num_ranks;                 ///< P >= 1
};

namespace cpu {
void locate_results(const LocateResultsArgs& args);
}
namespace cuda {
void locate_results(const LocateResultsArgs& args, Stream stream);
}

}  // namespace moecore
