#include "moecore/embedding.hpp"

#include "moecore/kernels/embedding.hpp"
#include "moecore/kernels/memory.hpp"
#include "ops/check.hpp"

namespace moecore {

void embedding(const TensorView& ids, const GroupedGemmWeights& weight, const TensorView& output,
               Stream stream) {
    const Check check("embedding");
    EmbeddingArgs args{};
    Device device;
    if (weight.packed != nullptr) {
        const PackedWeights& packed = *weight.packed;
        check.that(packed.num_groups() == 1 && !packed.gated(),
                   "weight must hold one group that is not gated, got ", packed.num_groups(),
                   packed.gated() ? " gated" : "");
        args.weight = packed.data();
        args.is_packed = true;
        args.num_rows = packed.n();
        args.width = packed.k_dim();
        args.dtype = packed.dtype();
        device = packed.device();
    } else {
        const TensorView& plain = weight.plain;
        check.dtype("weight", plain, {DType::kFloat32, DType::kBFloat16});
        check.shape("weight", plain, {Check::kAny, Check::kAny});
        check.rows_contiguous("weight", plain);
        check.that(plain.shape[1] >= 1, "weight must have at least one column, got ", plain);
        check.no_overlap("output", output, "weight", plain);
        args.weight = plain.data;
        args.weight_stride = plain.strides[0];
        args.num_rows = plain.shape[0];
        args.width = plain.shape[1];
        args.dtype = plain.dtype;
        device = plain.device;
    }
    check.dtype("ids", ids, {DType::kInt32, DType::kInt64});
    check.shape("ids", ids, {Check::kAny});
    check.contiguous("ids", ids);
    check.device("ids", ids, device);
    check.dtype("output", output, {args.dtype});
    check.shape("output", output, {ids.shape[0], args.width});
    check.rows_contiguous("output", output);
    check.device("output", output, device);
    check.no_overlap("output", output, "ids", ids);

    args.ids = ids.data;
    args.ids_dtype = ids.dtype;
    args.output = output.data;
    args.output_stride = output.strides[0];
    args.num_tokens = ids.shape[0];
    if (device.type == DeviceType::kCpu) {
        for (int64_t t = 0; t < args.num_tokens; ++t) {
            const int64_t id = args.id(t);
            check.that(id >= 0 && id < args.num_rows, "ids must be in [0, ", args.num_rows,
                       "), the rows of weight, got ", id, " at token ", t);
        }
    }
    switch (device.type) {
        case DeviceType::kCpu:
            return cpu::embedding(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(device.index);
            return cuda::embedding(args, stream);
        }
    }
}

}  // namespace moecore
