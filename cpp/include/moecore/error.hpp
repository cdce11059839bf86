#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace moecore {

/// A caller's mistake: shape, dtype, range or device. The message reads
/// `op: argument must be <rule>, got <value>`.
class InvalidArgument : public std::invalid_argument {
public:
    using std::invalid_argument::invalid_argument;
};

/// A right request that this build or this machine cannot serve.
class UnsupportedError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

/// A CUDA call failed: its name, the error's text, and where.
class CudaError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

/// Joins parts into one string.
template <typename... Parts>
std::string concat(const Parts&... parts) {
    std::ostringstream stream;
    (stream << ... << parts);
    return stream.str();
}

/// Throws InvalidArgument made of `parts` unless `condition` holds. Call sites are on the host path
/// of an op, so the parts cost nothing unless the check fails.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
    if (!condition) throw InvalidArgument(concat(parts...));
}

}  // namespace moecore
