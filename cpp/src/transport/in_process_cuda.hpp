#pragma once

#include <memory>

#include "moecore/transport.hpp"

namespace moecore {

/// A virtual rank on GPU `device`; `hosts` is how its thread meets the others.
std::unique_ptr<Transport> make_in_process_cuda_transport(std::unique_ptr<Transport> hosts,
                                                          Device device);

}  // namespace moecore
