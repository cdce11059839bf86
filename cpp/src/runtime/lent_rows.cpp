#include "runtime/lent_rows.hpp"

#include <numeric>

#include "moecore/error.hpp"
#include "moecore/kernels/memory.hpp"

namespace moecore {
namespace {

constexpr const char* kPhase = "lend";
static_assert(ShareRowsArgs::kMaxRanks >= AddressRowsArgs::kMaxParts);  // see can_lend_rows

LentMemory memory_of(const TensorView& view) {
    return {view.data, static_cast<size_t>(view.num_elements()) * size_of(view.dtype)};
}

int64_t address_of(const LentMemory& memory) {
    return static_cast<int64_t>(reinterpret_cast<intptr_t>(memory.data));
}

int64_t bytes_of(const TensorView& view, int64_t elements) {
    return elements * static_cast<int64_t>(size_of(view.dtype));
}

int64_t sum_before(std::span<const int64_t> counts, size_t end) {
    return std::accumulate(counts.begin(), counts.begin() + static_cast<ptrdiff_t>(end),
                           int64_t{0});
}

/// Where the rows of `rows` go, given what each rank lends for them and expects.
AddressRowsArgs address(const Transport& transport, const CrossingRows& rows, const Loans& loans,
                        size_t kind) {
    const auto ranks = static_cast<size_t>(transport.size());
    const size_t parts = rows.sent.counts.size();
    const auto me = static_cast<size_t>(transport.rank());
    AddressRowsArgs args{};
    args.index = rows.index.defined() ? rows.index.as<int32_t>() : nullptr;
    args.addresses = rows.addresses.as<int64_t>();
    args.num_rows = rows.sent.total();
    args.row_bytes = bytes_of(rows.memory, rows.memory.shape[1]);
    args.num_parts = static_cast<int>(parts);
    for (size_t part = 0; part < parts; ++part) {
        const size_t rank = part % ranks, there = part - rank + me;
        const auto theirs = std::span(loans.notes).subspan((rank * 2 + kind) * parts, parts);
        if (theirs[there] != rows.sent.counts[part])
            throw TransportError(
                static_cast<int>(rank), kPhase,
                concat("rank ", rank, " is out of step in phase '", kPhase, "': it expects ",
                       theirs[there], " rows, got ", rows.sent.counts[part]));
        args.firsts[part] = sum_before(rows.sent.counts, part);
        args.targets[part] =
            address_of(loans.memory[rank * 2 + kind]) + sum_before(theirs, there) * args.row_bytes;
    }
    return args;
}

}  // namespace

bool can_lend_rows(const Transport& transport, int num_groups) {
    return transport.can_lend() && num_groups * transport.size() <= AddressRowsArgs::kMaxParts;
}

void lend_rows(Transport& transport, const std::array<CrossingRows, 2>& rows, Stream stream) {
    std::array<LentMemory, 2> mine;
    std::vector<int64_t> notes;
    for (size_t kind = 0; kind < 2; ++kind) {
        mine[kind] = memory_of(rows[kind].memory);
        const auto& counts = rows[kind].received.counts;
        notes.insert(notes.end(), counts.begin(), counts.end());
    }
    const Loans loans = transport.lend(kPhase, mine, notes, stream);
    const std::array<AddressRowsArgs, 2> args = {address(transport, rows[0], loans, 0),
                                                 address(transport, rows[1], loans, 1)};
    switch (transport.device().type) {
        case DeviceType::kCpu:
            for (const AddressRowsArgs& one : args) cpu::address_rows(one);
            return;
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(transport.device().index);
            return cuda::address_rows(args, stream);
        }
    }
}

SharedPlaces lend_shared(Transport& transport, const char* phase,
                         const std::array<TensorView, 2>& memory, const TensorView& back,
                         Stream stream) {
    const auto ranks = static_cast<size_t>(transport.size());
    const auto me = static_cast<size_t>(transport.rank());
    constexpr size_t kLent = 3;
    const LentMemory mine[kLent] = {memory_of(memory[0]), memory_of(memory[1]), memory_of(back)};
    const Loans loans = transport.lend(phase, mine, {}, stream);

    SharedPlaces places{};
    for (size_t kind = 0; kind < 2; ++kind) {
        ShareRowsArgs& one = places.rows[kind];
        one.padded_rows = memory[kind].shape[1];
        one.row_bytes = bytes_of(memory[kind], memory[kind].shape[2]);
        one.num_targets = static_cast<int>(ranks);
        // Every rank begins with its right neighbour, so that none has to take from all at once.
        for (size_t i = 0; i < ranks; ++i)
            one.targets[i] = address_of(loans.memory[(me + 1 + i) % ranks * kLent + kind]) +
                             transport.rank() * one.padded_rows * one.row_bytes;
    }
    places.back.num_slots = static_cast<int64_t>(ranks) * back.shape[0];
    places.back.slots_per_rank = back.shape[0];
    places.back.row_bytes = bytes_of(back, back.shape[1]);
    for (size_t r = 0; r < ranks; ++r)
        places.back.targets[r] = address_of(loans.memory[r * kLent + 2]);
    return places;
}

void share_rows(const Transport& transport, const std::array<SharedRows, 2>& rows,
                const SharedPlaces& places, Stream stream) {
    std::array<ShareRowsArgs, 2> args = places.rows;
    for (size_t kind = 0; kind < 2; ++kind) {
        const TensorView& mine = rows[kind].rows;
        args[kind].source = mine.data;
        args[kind].source_stride = bytes_of(mine, mine.strides[0]);
        args[kind].num_rows = mine.shape[0];
        if (!rows[kind].is_padded) args[kind].padded_rows = mine.shape[0];
    }
    switch (transport.device().type) {
        case DeviceType::kCpu:
            for (const ShareRowsArgs& one : args) cpu::share_rows(one);
            return;
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(transport.device().index);
            return cuda::share_rows(args, stream);
        }
    }
}

void address_results(const SharedPlaces& places, const TensorView& sorted_slots,
                     const TensorView& addresses, Stream stream) {
    AddressSlotsArgs args = places.back;
    args.slots = sorted_slots.as<int32_t>();
    args.addresses = addresses.as<int64_t>();
    switch (addresses.device.type) {
        case DeviceType::kCpu:
            return cpu::address_slots(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(addresses.device.index);
            return cuda::address_slots(args, stream);
        }
    }
}

}  // namespace moecore
