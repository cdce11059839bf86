#include <algorithm>
#include <numeric>
#include <utility>

#include "moecore/dispatcher.hpp"
#include "moecore/threads.hpp"

namespace moecore {
namespace {

constexpr int kNone = -1;
constexpr int64_t kTokensPerChunk = 1024;

/// Consecutive tokens of one rank. Chunks are planned side by side: each counts what it has, then
/// fills the positions that follow those of the chunks before it.
struct Chunk {
    int source;
    int64_t begin, end;
};

void append_chunks(int source, int64_t num_tokens, std::vector<Chunk>& chunks) {
    for (int64_t begin = 0; begin < num_tokens; begin += kTokensPerChunk)
        chunks.push_back({source, begin, std::min(begin + kTokensPerChunk, num_tokens)});
}

/// One number for each chunk and bin.
class Counters {
public:
    Counters(size_t num_chunks, size_t num_bins)
        : num_bins_(num_bins), values_(num_chunks * num_bins) {}

    int64_t* of(size_t chunk) { return values_.data() + chunk * num_bins_; }

    /// Turns one bin's counts of the chunks begin .. end - 1 into first positions from `next` on,
    /// and moves `next` past them.
    void place(size_t bin, size_t begin, size_t end, int64_t& next) {
        for (size_t chunk = begin; chunk < end; ++chunk)
            next += std::exchange(of(chunk)[bin], next);
    }

private:
    size_t num_bins_;
    std::vector<int64_t> values_;
};

template <typename Fn>
void for_each_chunk(const std::vector<Chunk>& chunks, Fn&& fn) {
    // A thread pays from about four chunks on; more than eight wait for each other longer than they
    // work.
    constexpr int kChunksPerThread = 4, kMaxThreads = 8;
    const int count = static_cast<int>(chunks.size());
    const int threads =
        std::clamp(count / kChunksPerThread, 1, std::min(num_threads(), kMaxThreads));
    if (threads == 1) {
        for (size_t i = 0; i < chunks.size(); ++i) fn(i);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < count; ++i) fn(static_cast<size_t>(i));
}

/// fn(host, first group) for every rank that owns an expert of a token, whose ids are `ids`.
template <typename Fn>
void for_each_host(const ExpertPlaces& places, const int32_t* ids, int top_k, Fn&& fn) {
    int hosts[kMaxTopK], groups[kMaxTopK];
    int count = 0;
    for (int j = 0; j < top_k; ++j) {
        const ExpertPlaces::Place place = places.of(ids[j]);
        if (place.owner == kNone) continue;
        int at = 0;
        while (at < count && hosts[at] != place.owner) ++at;
        if (at == count) {
            hosts[count] = place.owner;
            groups[count++] = place.group;
        } else {
            groups[at] = std::min(groups[at], place.group);
        }
    }
    for (int i = 0; i < count; ++i) fn(hosts[i], groups[i]);
}

/// The side of a token's owner: copies to send, and where each slot's result arrives.
void plan_own_tokens(const ExpertPlaces& places, int top_k, std::span<const int32_t> ids,
                     DispatchPlan& plan) {
    const size_t ranks = plan.sent.num_ranks;
    const size_t bins = plan.sent.counts.size();  // (group, rank)
    const auto bin = [&](int group, int rank) {
        return static_cast<size_t>(group) * ranks + static_cast<size_t>(rank);
    };
    const auto k = static_cast<size_t>(top_k);
    std::vector<Chunk> chunks;
    append_chunks(0, plan.num_tokens, chunks);
    Counters sent(chunks.size(), bins), back(chunks.size(), bins);

    for_each_chunk(chunks, [&](size_t c) {
        for (auto token = static_cast<size_t>(chunks[c].begin);
             token < static_cast<size_t>(chunks[c].end); ++token) {
            for_each_host(places, ids.data() + token * k, top_k,
                          [&](int host, int group) { ++sent.of(c)[bin(group, host)]; });
            for (size_t slot = token * k; slot < (token + 1) * k; ++slot)
                if (const auto place = places.of(ids[slot]); place.owner != kNone)
                    ++back.of(c)[bin(place.group, place.owner)];
        }
    });
    int64_t num_sent = 0, num_back = 0;
    for (size_t i = 0; i < bins; ++i) {
        const int64_t first_sent = num_sent, first_back = num_back;
        sent.place(i, 0, chunks.size(), num_sent);
        back.place(i, 0, chunks.size(), num_back);
        plan.sent.counts[i] = num_sent - first_sent;
        plan.received_back.counts[i] = num_back - first_back;
    }
    plan.sent_tokens.resize(static_cast<size_t>(num_sent));
    plan.slot_to_back.resize(ids.size());
    for_each_chunk(chunks, [&](size_t c) {
        for (auto token = static_cast<size_t>(chunks[c].begin);
             token < static_cast<size_t>(chunks[c].end); ++token) {
            for_each_host(places, ids.data() + token * k, top_k, [&](int host, int group) {
                plan.sent_tokens[static_cast<size_t>(sent.of(c)[bin(group, host)]++)] =
                    static_cast<int32_t>(token);
            });
            for (size_t slot = token * k; slot < (token + 1) * k; ++slot) {
                const auto place = places.of(ids[slot]);
                plan.slot_to_back[slot] =
                    place.owner == kNone
                        ? kNone
                        : static_cast<int32_t>(back.of(c)[bin(place.group, place.owner)]++);
            }
        }
    });
}

/// The side of the experts' host: copies that arrive, rows of each expert, and where they go back.
class HostedRows {
public:
    HostedRows(const ExpertPlaces& places, int rank, int top_k,
               std::span<const std::span<const int32_t>> all_ids, DispatchPlan& plan)
        : places_(places), rank_(rank), top_k_(top_k), all_ids_(all_ids), plan_(plan) {
        for (size_t source = 0; source < all_ids.size(); ++source) {
            first_chunk_.push_back(chunks_.size());
            append_chunks(static_cast<int>(source),
                          static_cast<int64_t>(all_ids[source].size()) / top_k, chunks_);
        }
        first_chunk_.push_back(chunks_.size());
    }

    void plan() {
        const auto groups = static_cast<size_t>(places_.num_groups());
        const auto experts = static_cast<size_t>(places_.num_local(rank_));
        Counters copies(chunks_.size(), groups), back(chunks_.size(), groups),
            rows(chunks_.size(), experts);
        visit([&](size_t c, int64_t, int group) { ++copies.of(c)[group]; },
              [&](size_t c, int, const ExpertPlaces::Place& place) {
                  ++back.of(c)[place.group];
                  ++rows.of(c)[place.local];
              });

        int64_t num_copies = 0, num_back = 0, num_rows = 0;
        for (size_t g = 0; g < groups; ++g)
            for (size_t source = 0; source < all_ids_.size(); ++source) {
                const int64_t first_copy = num_copies, first_back = num_back;
                const size_t begin = first_chunk_[source], end = first_chunk_[source + 1];
                copies.place(g, begin, end, num_copies);
                back.place(g, begin, end, num_back);
                plan_.received.counts[g * all_ids_.size() + source] = num_copies - first_copy;
                plan_.sent_back.counts[g * all_ids_.size() + source] = num_back - first_back;
            }
        plan_.expert_offsets.assign(1, 0);
        for (size_t e = 0; e < experts; ++e) {
            rows.place(e, 0, chunks_.size(), num_rows);
            plan_.expert_offsets.push_back(num_rows);
        }
        plan_.copy_source.resize(static_cast<size_t>(num_copies));
        plan_.copy_token.resize(static_cast<size_t>(num_copies));
        plan_.sorted_slots.resize(static_cast<size_t>(num_rows));
        plan_.back_rows.resize(static_cast<size_t>(num_rows));

        std::vector<int64_t> current(chunks_.size());  // copy of the token at hand
        visit(
            [&](size_t c, int64_t token, int group) {
                const int64_t copy = copies.of(c)[group]++;
                plan_.copy_source[static_cast<size_t>(copy)] = chunks_[c].source;
                plan_.copy_token[static_cast<size_t>(copy)] = static_cast<int32_t>(token);
                current[c] = copy;
            },
            [&](size_t c, int j, const ExpertPlaces::Place& place) {
                const int64_t row = rows.of(c)[place.local]++;
                plan_.sorted_slots[static_cast<size_t>(row)] =
                    static_cast<int32_t>(current[c] * top_k_ + j);
                plan_.back_rows[static_cast<size_t>(back.of(c)[place.group]++)] =
                    static_cast<int32_t>(row);
            });
    }

private:
    /// Every token that needs this rank, in order within a chunk: on_copy(chunk, token, first
    /// group), then on_route(chunk, choice, place) for each of its experts here.
    template <typename OnCopy, typename OnRoute>
    void visit(OnCopy&& on_copy, OnRoute&& on_route) {
        for_each_chunk(chunks_, [&](size_t c) {
            const int32_t* all = all_ids_[static_cast<size_t>(chunks_[c].source)].data();
            for (int64_t token = chunks_[c].begin; token < chunks_[c].end; ++token) {
                const int32_t* ids = all + token * top_k_;
                int first_group = places_.num_groups();
                for (int j = 0; j < top_k_; ++j) {
                    const auto place = places_.of(ids[j]);
                    if (place.owner == rank_) first_group = std::min(first_group, place.group);
                }
                if (first_group == places_.num_groups()) continue;
                on_copy(c, token, first_group);
                for (int j = 0; j < top_k_; ++j)
                    if (const auto place = places_.of(ids[j]); place.owner == rank_)
                        on_route(c, j, place);
            }
        });
    }

    const ExpertPlaces& places_;
    int rank_, top_k_;
    std::span<const std::span<const int32_t>> all_ids_;
    DispatchPlan& plan_;
    std::vector<Chunk> chunks_;
    std::vector<size_t> first_chunk_;  ///< of each source, and the number of chunks
};

}  // namespace

ExpertPlaces::ExpertPlaces(std::span<const ExpertRange> ranges, int num_groups)
    : ranges_(ranges.begin(), ranges.end()), num_groups_(num_groups) {
    for (int owner = 0; owner < num_ranks(); ++owner) {
        int group = 0;
        for (int local = 0; local < num_local(owner); ++local) {
            while (local >= group_begin(owner, group + 1)) ++group;
            places_.push_back({owner, group, local});
        }
    }
}

int64_t RowCounts::before(int group) const {
    const auto end = counts.begin() + static_cast<int64_t>(num_ranks) * group;
    return std::accumulate(counts.begin(), end, int64_t{0});
}

int64_t RowCounts::total() const {
    return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

DispatchPlan make_dispatch_plan(const ExpertPlaces& places, int rank, int top_k,
                                std::span<const std::span<const int32_t>> all_ids) {
    DispatchPlan plan(places.num_groups(), places.num_ranks());
    const auto own = all_ids[static_cast<size_t>(rank)];
    plan.num_tokens = static_cast<int64_t>(own.size()) / top_k;
    plan_own_tokens(places, top_k, own, plan);
    HostedRows(places, rank, top_k, all_ids, plan).plan();
    return plan;
}

}  // namespace moecore
