#include "runtime/plan_tensors.hpp"

#include <algorithm>
#include <cstring>

namespace moecore {
namespace {

/// Host numbers, and the view that ops shall have of them.
struct Placed {
    TensorView* view;
    void* data;
    DType dtype;
    int64_t rows;
    int64_t width;  ///< 0 for a vector
    size_t size_bytes() const {
        return static_cast<size_t>(rows * std::max<int64_t>(width, 1)) * size_of(dtype);
    }
    void set(void* where, Device device) const {
        *view = width == 0 ? TensorView(where, dtype, {rows}, device)
                           : TensorView(where, dtype, {rows, width}, device);
    }
};

void upload(const std::vector<Placed>& all, PlanStorage& storage, Device device, Stream stream) {
    constexpr size_t kAlignment = 256;
    const auto padded = [](size_t bytes) {
        return (bytes + kAlignment - 1) / kAlignment * kAlignment;
    };
    size_t total = 0;
    for (const Placed& one : all) total += padded(one.size_bytes());
    if (storage.device_memory.device() != device) storage.device_memory = Workspace(device, 0);
    storage.device_memory.grow(total);
    const TensorView memory =
        storage.device_memory.take(DType::kInt32, {static_cast<int64_t>(total / sizeof(int32_t))});
    char* host = static_cast<char*>(storage.pinned.reserve(total));
    char* target = memory.as<char>();
    size_t at = 0;
    for (const Placed& one : all) {
        if (one.rows > 0) std::memcpy(host + at, one.data, one.size_bytes());
        one.set(target + at, device);
        at += padded(one.size_bytes());
    }
    cuda::copy(target, host, total, stream);
}

}  // namespace

PlanTensors place_plan(DispatchPlan& plan, FastReturn* fast, const ExpertPlaces& places, int rank,
                       PlanStorage& storage, Device device, Stream stream) {
    const auto groups = static_cast<size_t>(places.num_groups());
    const size_t width = plan.expert_offsets.size();
    storage.group_offsets.resize(groups * width);
    PlanTensors tensors;
    tensors.group_offsets.resize(groups);
    std::vector<Placed> all;
    for (size_t g = 0; g < groups; ++g) {
        const auto bound = [&](size_t group) {
            return plan.expert_offsets[static_cast<size_t>(
                places.group_begin(rank, static_cast<int>(group)))];
        };
        int64_t* offsets = storage.group_offsets.data() + g * width;
        for (size_t e = 0; e < width; ++e)
            offsets[e] = std::clamp(plan.expert_offsets[e], bound(g), bound(g + 1));
        all.push_back(
            {&tensors.group_offsets[g], offsets, DType::kInt64, static_cast<int64_t>(width), 0});
    }
    const auto add = [&](TensorView& view, auto& numbers, DType dtype, int64_t columns = 0) {
        const auto count = static_cast<int64_t>(numbers.size());
        all.push_back(
            {&view, numbers.data(), dtype, columns == 0 ? count : count / columns, columns});
    };
    add(tensors.sent_tokens, plan.sent_tokens, DType::kInt32);
    add(tensors.sorted_slots, plan.sorted_slots, DType::kInt32);
    add(tensors.back_rows, plan.back_rows, DType::kInt32);
    add(tensors.slot_to_back, plan.slot_to_back, DType::kInt32);
    if (fast != nullptr) {
        const auto copies = static_cast<int64_t>(plan.copy_token.size());
        const int64_t top_k =
            copies == 0 ? 1 : static_cast<int64_t>(fast->copy_weights.size()) / copies;
        add(tensors.copy_slot_to_row, fast->copy_slot_to_row, DType::kInt32);
        add(tensors.copy_weights, fast->copy_weights, DType::kFloat32, top_k);
        add(tensors.slot_to_partial, fast->slot_to_partial, DType::kInt32);
        add(tensors.ones, fast->ones, DType::kFloat32, places.num_ranks());
    }
    if (device.type == DeviceType::kCuda)
        upload(all, storage, device, stream);
    else
        for (const Placed& one : all) one.set(one.data, device);
    return tensors;
}

}  // namespace moecore
