#pragma once

// Help for launchers: checked calls, the caller's stream, run-time sizes as constants, and kernels
// that start before their predecessor has ended.

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

/// Whether the current device has what came with sm_90: clusters, and overlapping launches.
inline bool is_sm90() {
    int device = 0, major = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "cudaDeviceGetAttribute");
    return major >= 9;
}

/// Launches `kernel` so that, on sm_90 and newer, its blocks may start while the stream's previous
/// kernel still runs: launch latency and whatever the kernel does before wait_for_predecessors()
/// disappear behind it. Any kernel may come before or after it, and CUDA graphs keep the overlap.
/// With cluster_size > 1 (sm_90 only) that many neighbouring blocks form a cluster. Throws
/// CudaError, naming `op`.
///
/// REQUIRES: every block calls wait_for_predecessors() before it reads or overwrites anything that
/// an earlier kernel of the stream touches, and before it leaves, even where it has nothing to do:
/// only so does the end of this kernel mean the end of all before it. What a caller has declared
/// settled may be read earlier: no kernel since the last plain launch, or copy, writes it.
template <typename... Params>
void launch_dependent_clusters(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block,
                               unsigned cluster_size, size_t shared_bytes, Stream stream,
                               const std::type_identity_t<Params>&... args) {
    cudaLaunchAttribute attributes[2] = {};
    unsigned num_attributes = 0;
    if (is_sm90()) {
        cudaLaunchAttribute& overlap = attributes[num_attributes++];
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster_size > 1) {
        cudaLaunchAttribute& cluster = attributes[num_attributes++];
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {cluster_size, 1, 1};
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = native(stream);
    config.attrs = attributes;
    config.numAttrs = num_attributes;
    const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args...);
    if (status != cudaSuccess) check(status, concat(op, " launch").c_str());
}

/// The same without clusters.
template <typename... Params>
void launch_dependent(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block,
                      size_t shared_bytes, Stream stream,
                      const std::type_identity_t<Params>&... args) {
    launch_dependent_clusters(op, kernel, grid, block, 1, shared_bytes, stream, args...);
}

/// Reads a word of each 64 bytes of a kernel's parameters. They lie in memory that nothing has read
/// since the kernel last ran: called before the wait for predecessors, it hides that their first
/// use takes as long as one of memory.
template <typename Args>
__device__ __forceinline__ void load_parameters(const Args& args) {
    constexpr unsigned kStep = 64 / sizeof(unsigned);
    const auto* words = reinterpret_cast<const unsigned*>(&args);
    unsigned any = 0;
#pragma unroll
    for (unsigned i = 0; i < sizeof(Args) / sizeof(unsigned); i += kStep) any |= words[i];
    // A use that the compiler must keep, and that does nothing to speak of.
    asm volatile(
        "{\n .reg .pred p;\n setp.eq.u32 p, %0, 0xffffffff;\n @p nanosleep.u32 1;\n}" ::"r"(any));
}

/// Waits for the end of every kernel before this one in the stream; what they wrote is visible
/// after it. Returns at once where the kernel was launched plainly.
__device__ inline void wait_for_predecessors() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next launch_dependent kernel start, as soon as every block has called this or left. It
/// promises nothing about memory: the next kernel waits for the end of this one all the same.
/// Called after the wait: with whole rows of kernels in place, each was 1 to 2 us slower (one
/// H100).
__device__ inline void allow_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace moecore::cuda
