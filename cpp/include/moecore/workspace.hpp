#pragma once

#include <cstddef>
#include <initializer_list>

#include "moecore/buffer.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// Scratch memory for one call at a time: hands out consecutive views of one Buffer, which alone
/// owns the bytes. Not thread-safe; one Workspace per caller.
class Workspace {
public:
    Workspace(Device device, size_t bytes);

    /// A contiguous view of uninitialised memory, valid until the next reset() or grow().
    /// Throws InvalidArgument when the workspace has too few bytes left.
    TensorView take(DType dtype, std::initializer_list<int64_t> shape);

    /// [kNumCounters] int32 for kernels that hand out their work by counting; not defined on the
    /// CPU. They are zero between launches: who counts in them sets them back.
    TensorView counters() const;
    static constexpr int64_t kNumCounters = 2;

    void reset() noexcept { used_ = 0; }

    /// Replaces the buffer by a larger one if it has fewer than `bytes`; forgets every view.
    void grow(size_t bytes);

    size_t size_bytes() const { return buffer_.size_bytes(); }
    Device device() const { return buffer_.device(); }

    /// Bytes that take() uses for such a view, padding included.
    static size_t bytes_for(DType dtype, std::initializer_list<int64_t> shape);

private:
    Buffer buffer_;
    Buffer counters_;
    size_t used_ = 0;
};

}  // namespace moecore
