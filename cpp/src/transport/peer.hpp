#pragma once

#include <memory>

#include "moecore/transport.hpp"

namespace moecore {

/// A peer transport that meets the others at its first exchange: for ranks that one thread makes.
/// `kind`: what kind() says, a string that lives for ever.
std::unique_ptr<Transport> make_unmet_peer_transport(PeerOptions options, const char* kind);

}  // namespace moecore
