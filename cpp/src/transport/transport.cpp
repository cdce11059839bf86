#include "moecore/transport.hpp"

#include <cmath>

#include "moecore/error.hpp"

namespace moecore {

void Transport::barrier(const char* phase) {
    std::vector<char> all(static_cast<size_t>(size()));
    const char mine = 0;
    all_gather(phase, &mine, all.data(), 1);
}

void Transport::all_gather_rows(const char* phase, const void* mine, void* all, size_t bytes,
                                Stream) {
    all_gather(phase, mine, all, bytes);
}

Loans Transport::lend(const char* phase, std::span<const LentMemory>, std::span<const int64_t>,
                      Stream) {
    throw UnsupportedError(
        concat("Transport: ", kind(), " lends no memory, asked to in phase '", phase, "'"));
}

void Transport::finish_writes(const char* phase, Stream) {
    throw UnsupportedError(
        concat("Transport: ", kind(), " lends no memory, asked to in phase '", phase, "'"));
}

void Transport::abort_because(const std::exception& error) {
    const auto* known = dynamic_cast<const TransportError*>(&error);
    if (known != nullptr && known->rank() >= 0)
        pass_on(*known);
    else
        abort(error.what());
}

void Transport::set_deadline(double seconds) {
    require(seconds > 0 && std::isfinite(seconds), "Transport: deadline must be > 0 seconds, got ",
            seconds);
    deadline_ = seconds;
}

ExpertRange expert_range(int num_experts, int rank, int size) {
    require(size >= 1, "expert_range: size must be >= 1, got ", size);
    require(rank >= 0 && rank < size, "expert_range: rank must be in [0, size), got ", rank,
            " with size ", size);
    require(num_experts >= size, "expert_range: size must be <= num_experts, got ", size, " with ",
            num_experts, " experts");
    const auto begin = [&](int r) { return static_cast<int>(int64_t{num_experts} * r / size); };
    return {begin(rank), begin(rank + 1) - begin(rank)};
}

}  // namespace moecore
