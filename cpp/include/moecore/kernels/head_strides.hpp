#pragma once

#include <cstdint>

namespace moecore {

/// Elements between the rows of neighbouring tokens, and of neighbouring heads of one token.
struct HeadStrides {
    int64_t token;
    int64_t head;
};

}  // namespace moecore
