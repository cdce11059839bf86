#include "moecore/kernels/norm_and_rotate.hpp"

namespace moecore::cpu {

void norm_and_rotate(const NormAndRotateArgs& args) {
    rms_norm(args.query);
    rms_norm(args.key);
    rotary_embedding(args.rotary);
}

}  // namespace moecore::cpu
