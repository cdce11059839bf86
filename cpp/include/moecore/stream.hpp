#pragma once

namespace moecore {

/// A CUDA stream, opaque so that no public header includes cuda_runtime.h. CPU ops ignore it: they
/// have finished when they return. nullptr is the legacy default stream.
struct Stream {
    void* handle = nullptr;
};

}  // namespace moecore
