#include "moecore/kernels/rotate_and_cache.hpp"

namespace moecore::cpu {

void rotate_and_cache(const RotateAndCacheArgs& args) {
    if (args.has_norm)
        norm_and_rotate(args.heads);
    else
        rotary_embedding(args.heads.rotary);
    write_kv_cache(args.store);
}

}  // namespace moecore::cpu
