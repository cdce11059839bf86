#include "ranks.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <optional>
#include <thread>

#include "ep_transports.hpp"
#include "moecore/kernels/device_queue.hpp"
#include "moecore/kernels/memory.hpp"

namespace moecore::bench {
namespace {

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(2);
}

/// What one rank does, from its transport to its end; 0 if it threw nothing.
int run_rank(const RankOptions& options, const std::function<std::unique_ptr<Transport>()>& make,
             const std::function<void(Transport&)>& body) {
    try {
        std::unique_ptr<Transport> transport = make();
        if (options.emulated_gbps > 0)
            transport = make_paced_transport(std::move(transport), options.emulated_gbps,
                                             options.emulated_us);
        std::optional<cuda::DeviceScope> current;
        const Device device = transport->device();
        if (device.type == DeviceType::kCuda) current.emplace(device.index);
        body(*transport);
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}

int run_threads(const RankOptions& options,
                std::vector<std::function<std::unique_ptr<Transport>()>> make,
                const std::function<void(Transport&)>& body) {
    std::vector<int> status(make.size());
    std::vector<std::thread> threads;
    for (size_t r = 0; r < make.size(); ++r)
        threads.emplace_back([&, r] { status[r] = run_rank(options, make[r], body); });
    for (std::thread& thread : threads) thread.join();
    return *std::max_element(status.begin(), status.end());
}

int run_processes(const RankOptions& options, const std::function<void(Transport&)>& body) {
    const std::string name = "bench-" + std::to_string(getpid());
    std::vector<pid_t> children;
    for (int r = 0; r < options.ranks; ++r) {
        const pid_t child = fork();
        if (child < 0) fail("fork failed");
        if (child == 0) {
            const int status = run_rank(
                options,
                [&]() -> std::unique_ptr<Transport> {
                    auto hosts =
                        make_shm_transport({.name = name, .rank = r, .size = options.ranks});
                    if (options.transport != "peer") return hosts;
                    const int gpus = std::max(1, cuda::device_count());
                    return make_peer_transport(
                        {.hosts = std::move(hosts), .device = {DeviceType::kCuda, r % gpus}});
                },
                body);
            std::fflush(stdout);
            _exit(status);
        }
        children.push_back(child);
    }
    int worst = 0;
    for (const pid_t child : children) {
        int status = 0;
        waitpid(child, &status, 0);
        worst = std::max(worst, WIFEXITED(status) ? WEXITSTATUS(status) : 1);
    }
    return worst;
}

}  // namespace

RankOptions take_rank_options(int& argc, char** argv) {
    RankOptions options;
    int kept = 1;
    for (int i = 1; i < argc; ++i) {
        const std::string flag = argv[i];
        const bool is_ours =
            flag == "--ranks" || flag == "--transport" || flag == "--emulate" || flag == "--trace";
        if (flag == "--cuda") {
            options.cuda = true;
            continue;
        }
        if (!is_ours) {
            argv[kept++] = argv[i];
            continue;
        }
        if (++i == argc) fail(flag + " must have a value");
        const std::string value = argv[i];
        if (flag == "--ranks") options.ranks = std::atoi(value.c_str());
        if (flag == "--transport") options.transport = value;
        if (flag == "--trace") options.trace_file = value;
        if (flag == "--emulate" && std::sscanf(value.c_str(), "%lf,%lf", &options.emulated_gbps,
                                               &options.emulated_us) != 2)
            fail("--emulate must be GB/s,us, got " + value);
    }
    argc = kept;
    if (options.ranks < 1) fail("--ranks must be >= 1");
    if (options.transport != "in_process" && options.transport != "shm" &&
        options.transport != "nccl" && options.transport != "peer")
        fail("--transport must be in_process, shm, nccl or peer, got " + options.transport);
    return options;
}

void run_group(const RankOptions& options, const std::function<void(Transport&)>& body) {
    int status = 0;
    if (options.transport == "shm" || options.transport == "peer") {
        status = run_processes(options, body);
    } else {
        const Device device{options.cuda ? DeviceType::kCuda : DeviceType::kCpu, 0};
        const bool is_nccl = options.transport == "nccl";
        auto hosts = make_in_process_transports(options.ranks, is_nccl ? Device{} : device);
        const std::string id = is_nccl ? nccl_unique_id() : "";
        const int gpus = is_nccl ? std::max(1, cuda::device_count()) : 1;
        std::vector<std::function<std::unique_ptr<Transport>()>> make;
        for (int r = 0; r < options.ranks; ++r)
            make.push_back([&, r]() -> std::unique_ptr<Transport> {
                auto host = std::move(hosts[static_cast<size_t>(r)]);
                if (!is_nccl) return host;
                const Device own{DeviceType::kCuda, r % gpus};
                return make_nccl_transport({.unique_id = id,
                                            .rank = r,
                                            .size = options.ranks,
                                            .device = own,
                                            .hosts = std::move(host)});
            });
        status = run_threads(options, make, body);
    }
    if (status != 0) std::exit(status);
}

std::vector<double> max_over_ranks(Transport& transport, std::vector<double> values) {
    const size_t count = values.size();
    std::vector<double> all(count * static_cast<size_t>(transport.size()));
    transport.all_gather("figures", values.data(), all.data(), count * sizeof(double));
    for (size_t i = 0; i < all.size(); ++i) values[i % count] = std::max(values[i % count], all[i]);
    return values;
}

}  // namespace moecore::bench
