#include "runtime/lent_rows.hpp"

#include <numeric>

#include "moecore/error.hpp"
#include "moecore/kernels/address_rows.hpp"
#include "moecore/kernels/memory.hpp"

namespace moecore {
namespace {

constexpr const char* kPhase = "lend";

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
    args.row_bytes = rows.memory.shape[1] * static_cast<int64_t>(size_of(rows.memory.dtype));
    args.num_parts = static_cast<int>(parts);
    for (size_t part = 0; part < parts; ++part) {
        const size_t rank = part % ranks, there = part - rank + me;
        const auto theirs = std::span(loans.notes).subspan((rank * 2 + kind) * parts, parts);
        if (theirs[there] != rows.sent.counts[part])
            throw TransportError(
                static_cast<int>(rank), kPhase,
                concat("rank ", rank, " is out of step in phase '", kPhase, "': it expects ",
                       theirs[there], " rows, got ", rows.sent.counts[part]));
        const auto memory = reinterpret_cast<intptr_t>(loans.memory[rank * 2 + kind].data);
        args.firsts[part] = sum_before(rows.sent.counts, part);
        args.targets[part] = memory + sum_before(theirs, there) * args.row_bytes;
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
        const TensorView& memory = rows[kind].memory;
        mine[kind] = {memory.data,
                      static_cast<size_t>(memory.num_elements()) * size_of(memory.dtype)};
        const auto& counts = rows[kind].received.counts;
        notes.insert(notes.end(), counts.begin(), counts.end());
    }
    const Loans loans = transport.lend(kPhase, mine, notes, stream);
    const cuda::DeviceScope scope(transport.device().index);
    cuda::address_rows(
        {address(transport, rows[0], loans, 0), address(transport, rows[1], loans, 1)}, stream);
}

}  // namespace moecore
