#pragma once

// Ranks that are threads, and one MoE layer cut among them.

#include <unistd.h>

#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "moecore/expert_parallel.hpp"
#include "moecore/moe_layer.hpp"
#include "moecore/transport.hpp"
#include "test_main.hpp"

namespace moecore::test {

/// Calls body(rank) in a thread for each rank. Returns what each threw.
inline std::vector<std::exception_ptr> run_ranks(int size, const std::function<void(int)>& body) {
    std::vector<std::exception_ptr> errors(static_cast<size_t>(size));
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank)
        threads.emplace_back([&, rank] {
            try {
                body(rank);
            } catch (...) {
                errors[static_cast<size_t>(rank)] = std::current_exception();
            }
        });
    for (std::thread& thread : threads) thread.join();
    return errors;
}

/// The same, where no rank may throw.
inline void run_all_ranks(int size, const std::function<void(int)>& body) {
    for (const std::exception_ptr& error : run_ranks(size, body))
        if (error != nullptr) std::rethrow_exception(error);
}

using Transports = std::vector<std::unique_ptr<Transport>>;

inline Transports loopback_transports() {
    Transports transports;
    transports.push_back(make_loopback_transport());
    return transports;
}

/// A group over shared memory, though of threads.
inline Transports shm_transports(int size, size_t ring_bytes = 0) {
    static std::atomic<int> runs{0};
    const std::string name = concat("test-", getpid(), "-", runs++);
    Transports transports(static_cast<size_t>(size));
    run_all_ranks(size, [&](int rank) {
        transports[static_cast<size_t>(rank)] = make_shm_transport({.name = name,
                                                                    .rank = rank,
                                                                    .size = size,
                                                                    .connect_deadline = 20,
                                                                    .ring_bytes = ring_bytes});
    });
    return transports;
}

/// What a rank threw: its text, and the rank at fault if it is a TransportError.
struct Failure {
    std::string text = "no error";
    int culprit = -2;
    std::string phase;
};
inline Failure failure_of(const std::exception_ptr& error) {
    try {
        if (error != nullptr) std::rethrow_exception(error);
    } catch (const TransportError& e) {
        return {e.what(), e.rank(), e.phase()};
    } catch (const std::exception& e) {
        return {e.what(), -2, ""};
    }
    return {};
}

struct EpSizes {
    int64_t hidden = 24, inner = 16, shared = 0;
    int experts = 8, top_k = 2;
    DType dtype = kBf16;
};

/// All experts of a layer, and a view of any rank's share of them.
class WholeLayer {
public:
    explicit WholeLayer(const EpSizes& sizes, uint32_t seed = 3) : sizes_(sizes) {
        Random random(seed);
        const int64_t e = sizes.experts, h = sizes.hidden, i = sizes.inner, s = sizes.shared;
        gate_up_ = random.array(sizes.dtype, e * 2 * i * h, 0.4);
        down_ = random.array(sizes.dtype, e * h * i, 0.4);
        gate_up_bias_ = random.array(kF32, e * 2 * i);
        shared_gate_up_ = random.array(sizes.dtype, 2 * s * h, 0.4);
        shared_down_ = random.array(sizes.dtype, h * s, 0.4);
    }

    MoEConfig config(ExpertRange range) const {
        MoEConfig config;
        config.hidden_size = sizes_.hidden;
        config.intermediate_size = sizes_.inner;
        config.num_experts = sizes_.experts;
        config.first_expert = range.first;
        config.num_local_experts = range.count;
        config.routing = {.top_k = sizes_.top_k};
        config.activation.activation = Activation::kSwiglu;
        config.shared_intermediate_size = sizes_.shared;
        config.dtype = sizes_.dtype;
        return config;
    }
    MoEConfig config() const { return config({0, sizes_.experts}); }

    MoEWeights weights(ExpertRange range) {
        const int64_t h = sizes_.hidden, i = sizes_.inner, s = sizes_.shared;
        const auto part = [&](Array& array, int64_t each, std::initializer_list<int64_t> shape) {
            TensorView view = array.view(shape);
            view.data = static_cast<char*>(view.data) +
                        static_cast<size_t>(range.first * each) * size_of(array.dtype());
            return view;
        };
        MoEWeights weights;
        weights.gate_up = part(gate_up_, 2 * i * h, {range.count, 2 * i, h});
        weights.down = part(down_, h * i, {range.count, h, i});
        weights.gate_up_bias = part(gate_up_bias_, 2 * i, {range.count, 2 * i});
        if (s > 0) {
            weights.shared_gate_up = shared_gate_up_.view({2 * s, h});
            weights.shared_down = shared_down_.view({h, s});
        }
        return weights;
    }
    MoEWeights weights() { return weights({0, sizes_.experts}); }

    const EpSizes& sizes() const { return sizes_; }

private:
    EpSizes sizes_;
    Array gate_up_, down_, gate_up_bias_, shared_gate_up_, shared_down_;
};

/// One rank's tokens, routed.
struct RankTokens {
    int64_t count = 0;
    Array hidden, ids, weights, output;

    RankTokens(const EpSizes& sizes, int64_t num_tokens, uint32_t seed,
               const std::function<int64_t(Random&)>& choose_expert)
        : count(num_tokens) {
        Random random(seed);
        hidden = random.array(sizes.dtype, num_tokens * sizes.hidden);
        ids = Array(DType::kInt32, num_tokens * sizes.top_k);
        for (int64_t i = 0; i < ids.size(); ++i)
            ids.set(i, static_cast<double>(choose_expert(random)));
        weights = random.array(kF32, num_tokens * sizes.top_k);
        output = Array(sizes.dtype, num_tokens * sizes.hidden);
    }

    void run(const MoELayer& layer, Workspace& workspace) {
        const int64_t width = layer.config().hidden_size, top_k = layer.config().routing.top_k;
        workspace.grow(layer.workspace_bytes(count));
        layer.forward_routed(hidden.view({count, width}), ids.view({count, top_k}),
                             weights.view({count, top_k}), output.view({count, width}), workspace);
    }

    /// The output of one rank with all experts.
    std::vector<unsigned char> expected(WholeLayer& whole) {
        const MoELayer layer(whole.config(), whole.weights());
        Workspace workspace({}, 0);
        run(layer, workspace);
        return output.bytes();
    }
};

}  // namespace moecore::test
