#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "moecore/expert_parallel.hpp"
#include "moecore/transport.hpp"

namespace moecore::bindings {

/// A rank's transport, and what its layers share over it.
class PyTransport {
public:
    explicit PyTransport(std::unique_ptr<Transport> transport);

    /// Throws ValueError after close().
    Transport& transport() const;
    ExpertParallel& ranks() const;
    /// Gives the transport away; this is closed afterwards.
    std::unique_ptr<Transport> release();
    void close();

private:
    std::unique_ptr<Transport> transport_;
    std::unique_ptr<ExpertParallel> ranks_;
};

}  // namespace moecore::bindings
