#pragma once

// A group of ranks for a benchmark: threads, processes, or GPUs.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "moecore/transport.hpp"

namespace moecore::bench {

/// --ranks N, --transport in_process|shm|nccl|peer, --cuda (virtual ranks on one GPU with
/// in_process),
/// --emulate GB/s,us, --trace FILE. Takes its options out of argv; exits with a message on a bad
/// value.
struct RankOptions {
    int ranks = 2;
    std::string transport = "in_process";
    bool cuda = false;
    double emulated_gbps = 0.0, emulated_us = 0.0;
    std::string trace_file;
};
RankOptions take_rank_options(int& argc, char** argv);
/// They in a usage line.
inline constexpr const char* kRankOptions =
    " [--ranks N] [--transport in_process|shm|nccl|peer] [--cuda] [--emulate GB/s,us]"
    " [--trace FILE]";

/// Calls body(transport) on every rank, and returns when all are done. Exits with the message of
/// what a rank threw. Only rank 0 may print: the others may be processes.
void run_group(const RankOptions& options, const std::function<void(Transport&)>& body);

/// The largest value of any rank, for each of `values`.
std::vector<double> max_over_ranks(Transport& transport, std::vector<double> values);

}  // namespace moecore::bench
