#pragma once

#include <charconv>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

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

/// An NCCL call failed: its name, the error's text, and where.
class NcclError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

/// Text of one part of a message: a string, a number, a bool as true or false, or what a to_string
/// beside its type takes. No iostreams: their locale objects break where two copies of the C++
/// library meet in one process.
template <typename Part>
std::string text_of(const Part& part) {
    if constexpr (std::is_same_v<Part, bool>) {
        return part ? "true" : "false";
    } else if constexpr (std::is_same_v<Part, char>) {
        return std::string(1, part);
    } else if constexpr (std::is_arithmetic_v<Part>) {
        char digits[64];
        return {digits, std::to_chars(digits, digits + sizeof digits, part).ptr};
    } else if constexpr (requires { to_string(part); }) {
        return to_string(part);
    } else {
        return std::string(part);
    }
}

/// Joins parts into one string.
template <typename... Parts>
std::string concat(const Parts&... parts) {
    return (std::string() + ... + text_of(parts));
}

/// Throws InvalidArgument made of `parts` unless `condition` holds. Call sites are on the host path
/// of an op, so the parts cost nothing unless the check fails: give a tensor, not its text.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
    if (!condition) throw InvalidArgument(concat(parts...));
}

}  // namespace moecore
