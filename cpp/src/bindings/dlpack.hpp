#pragma once

// How Python's arrays become TensorViews: DLPack (https://dmlc.github.io/dlpack). A type that
// offers
// __dlpack_c_exchange_api__ (torch >= 2.10) is read by one C call; any other through __dlpack__().

#include <pybind11/pybind11.h>

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore::bindings {

/// A Python array as a TensorView, valid while this object lives. The Python object must outlive it
/// too, as a function's arguments do.
class TensorArg {
public:
    /// None gives an absent view if `optional`. Throws TypeError if `object` is no array (`op` and
    /// `name` go into the message), InvalidArgument for a dtype, device or rank outside moecore's.
    TensorArg(pybind11::handle object, const char* op, const char* name, bool optional = false);
    ~TensorArg();
    TensorArg(const TensorArg&) = delete;
    TensorArg& operator=(const TensorArg&) = delete;

    const TensorView& view() const { return view_; }
    operator const TensorView&() const { return view_; }

    /// The framework's current stream on the view's device; the default stream on the CPU, or where
    /// the framework does not say.
    Stream current_stream() const { return stream_; }

private:
    TensorView view_;
    Stream stream_;
    void* managed_ = nullptr;  ///< DLManagedTensor(Versioned)* to release
    bool is_versioned_ = false;
};

}  // namespace moecore::bindings
