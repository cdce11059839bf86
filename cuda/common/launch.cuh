#pragma once

// Host-side help for launchers: checked calls, the caller's stream, run-time sizes as constants.

#include <cuda_runtime.h>

#include <source_location>
#include <type_traits>
#include <utility>

#include "moecore/error.hpp"
#include "moecore/stream.hpp"

namespace moecore::cuda {

/// Throws CudaError, naming `what`, the error and the call site, unless `status` is cudaSuccess.
inline void check(cudaError_t status, const char* what,
                  std::source_location where = std::source_location::current()) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // reported here, so the next launch must not see it again
    throw CudaError(concat(what, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status),
                           " (", where.file_name(), ":", where.line(), ")"));
}

inline cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

/// a / b rounded up, for a >= 0 and b > 0.
template <typename Int>
constexpr __host__ __device__ Int ceil_div(Int a, std::type_identity_t<Int> b) {
    return (a + b - 1) / b;
}

/// Calls fn(integral_constant<int, N>) with the first N of `Ns` that is >= needed.
/// Returns false, and calls nothing, if none is. This is how a run-time size becomes a
/// compile-time one; there is no dispatch macro in this repository.
template <int... Ns, typename Fn>
bool dispatch_at_least(int needed, std::integer_sequence<int, Ns...>, Fn&& fn) {
    return ((needed <= Ns && (fn(std::integral_constant<int, Ns>{}), true)) || ...);
}

}  // namespace moecore::cuda
