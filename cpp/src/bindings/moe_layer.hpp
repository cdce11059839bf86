#pragma once

#include "moecore/moe_layer.hpp"

#include <pybind11/pybind11.h>

#include <mutex>

#include "bindings/named_tensors.hpp"
#include "bindings/transport.hpp"

namespace moecore::bindings {

/// A MoELayer with what Python cannot lend it call by call: references to its weights, and scratch
/// memory that grows to the largest T seen. One call at a time; concurrent callers wait.
class PyMoELayer {
public:
    /// `transport`: a Transport of this module, which the layer keeps alive, or None.
    PyMoELayer(const MoEConfig& config, pybind11::dict weights, pybind11::object transport,
               const ExpertParallelConfig& how);

    void forward(pybind11::handle hidden_states, pybind11::handle router_logits,
                 pybind11::handle output);
    void forward_routed(pybind11::handle hidden_states, pybind11::handle topk_ids,
                        pybind11::handle topk_weights, pybind11::handle output);

    /// For callers with scratch memory of their own; valid while this lives.
    const MoELayer& layer() const { return layer_; }

private:
    template <typename Fn>
    void run(const TensorView& hidden_states, const TensorView& output, Fn&& fn);
    MoEWeights views();
    MoELayer make_layer(const MoEConfig& config, const ExpertParallelConfig& how);

    NamedTensors weights_;
    pybind11::object transport_;
    Device device_;
    MoELayer layer_;
    Workspace workspace_;
    std::mutex mutex_;
};

}  // namespace moecore::bindings
