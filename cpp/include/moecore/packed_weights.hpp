#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "moecore/buffer.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// A matrix in an open file: its rows one after the other, of the dtype that is packed.
struct FileMatrix {
    int descriptor;
    int64_t offset;  ///< of its first byte, which may lie anywhere
    int64_t num_rows;
    int64_t k_dim;
};

/// A file ended within a matrix, or could not be read.
class FileReadError : public std::runtime_error {
public:
    FileReadError(size_t matrix, int64_t found, int error_number);

    size_t matrix() const { return matrix_; }  ///< which one of those given, over all packings
    int64_t found() const { return found_; }   ///< bytes of it before the end or the error
    int error_number() const { return error_number_; }  ///< errno, or 0 at the end of the file

private:
    size_t matrix_;
    int64_t found_;
    int error_number_;
};

class PackedWeights;

/// One group of packed weights, whose rows are those of the matrices in turn; if it is gated, all
/// gates before all ups.
struct FilePacking {
    PackedWeights* weights;
    int64_t group;
    std::vector<FileMatrix> matrices;
};

/// Expert weights in the order that the kernels of their device read best, made once at load.
///
/// On the CPU: panels of 64 output features, K pairs outermost, so that every tile size streams
/// them front to back. A gated panel holds 32 gate rows and the 32 up rows of the same features, so
/// that the activation needs one panel only. The bits of a product do not depend on whether its
/// weights are packed.
///
/// Packing reads the source once, so a loader can pack each expert straight out of its file; the
/// packed form takes the bytes of the original (rounded up to whole panels). Large ones sit in huge
/// pages where the kernel grants them. Reading is thread-safe; pack() of different groups too.
class PackedWeights {
public:
    /// Room for `num_groups` matrices [n, k_dim], uninitialised until packed.
    /// dtype: float32 or bfloat16. gated: n = 2 I rows, gate and up.
    /// Throws InvalidArgument on sizes below 1, an odd n when gated, or another dtype;
    /// UnsupportedError on a device without packed kernels.
    PackedWeights(DType dtype, int64_t num_groups, int64_t n, int64_t k_dim, bool gated,
                  Device device = {});

    /// Packs one matrix [n, k_dim] (not gated). Either dimension may be the contiguous one.
    void pack(int64_t group, const TensorView& weights);

    /// Packs gate [n / 2, k_dim] and up [n / 2, k_dim] of one gated group. Interleaved checkpoints
    /// pass views with a doubled row stride.
    void pack_gated(int64_t group, const TensorView& gate, const TensorView& up);

    /// Packs different groups, of any weights, out of files, on `num_threads` threads. Each reads a
    /// piece (512 KB, or a panel) and packs it out of its cache, so nothing is mapped. Checks all
    /// before it packs any. Throws FileReadError; some of the groups are then not packed.
    static void pack_files(std::span<const FilePacking> packings, int num_threads);

    DType dtype() const { return dtype_; }
    int64_t num_groups() const { return num_groups_; }
    int64_t n() const { return n_; }
    int64_t k_dim() const { return k_dim_; }
    bool gated() const { return gated_; }
    Device device() const { return buffer_.device(); }
    size_t size_bytes() const { return buffer_.size_bytes(); }
    const void* data() const { return buffer_.data(); }
    int64_t group_stride() const { return group_stride_; }  ///< in elements

private:
    char* group_data(int64_t group);
    void pack_group(int64_t group, const TensorView& first, const TensorView& second);

    DType dtype_;
    int64_t num_groups_;
    int64_t n_;
    int64_t k_dim_;
    bool gated_;
    int64_t group_stride_;
    Buffer buffer_;
};

}  // namespace moecore
