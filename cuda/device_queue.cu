// Copies, streams and events for the runtime: what orders communication beside computation.
//
//   reads   what is copied
//   writes  what is copied or filled
//
// No kernels, any architecture. Events carry time stamps only for traces.

#include "moecore/kernels/device_queue.hpp"

#include "common/launch.cuh"
#include "moecore/kernels/memory.hpp"

namespace moecore::cuda {

int device_count() {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    return count;
}

void copy(void* target, const void* source, size_t bytes, Stream stream) {
    if (bytes == 0) return;
    check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, native(stream)),
          "cudaMemcpyAsync");
}

void fill(void* target, unsigned char value, size_t bytes, Stream stream) {
    if (bytes == 0) return;
    check(cudaMemsetAsync(target, value, bytes, native(stream)), "cudaMemsetAsync");
}

PinnedBuffer::~PinnedBuffer() {
    if (data_ != nullptr) cudaFreeHost(data_);
}

void* PinnedBuffer::reserve(size_t bytes) {
    if (bytes <= bytes_) return data_;
    if (data_ != nullptr) check(cudaFreeHost(data_), "cudaFreeHost");
    data_ = nullptr;
    bytes_ = 0;
    check(cudaHostAlloc(&data_, bytes, cudaHostAllocPortable),
          concat("cudaHostAlloc of ", bytes, " bytes").c_str());
    bytes_ = bytes;
    return data_;
}

OwnedStream::OwnedStream(int device) : device_(device) {
    const DeviceScope scope(device);
    cudaStream_t stream = nullptr;
    // Of the highest priority: a transfer that waits for a GEMM's last blocks delays every rank.
    int lowest = 0, highest = 0;
    check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highest),
          "cudaStreamCreateWithPriority");
    stream_.handle = stream;
}

OwnedStream::~OwnedStream() {
    // As in deallocate(): at process exit the driver may be gone first.
    int previous = 0;
    if (cudaGetDevice(&previous) != cudaSuccess || cudaSetDevice(device_) != cudaSuccess) return;
    cudaStreamDestroy(native(stream_));
    cudaSetDevice(previous);
}

Event::Event(int device, Use use) : device_(device) {
    const DeviceScope scope(device);
    unsigned flags = use == Use::kTime ? cudaEventDefault : cudaEventDisableTiming;
    if (use == Use::kShare) flags |= cudaEventInterprocess;
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, flags), "cudaEventCreateWithFlags");
    handle_ = event;
}

Event Event::adopt(void* handle, int device) {
    Event event;
    event.handle_ = handle;
    event.device_ = device;
    return event;
}

Event::~Event() {
    if (handle_ != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(handle_));
}

void Event::record(Stream stream) {
    check(cudaEventRecord(static_cast<cudaEvent_t>(handle_), native(stream)), "cudaEventRecord");
}

bool Event::is_done() const {
    const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(handle_));
    if (status == cudaErrorNotReady) {
        cudaGetLastError();
        return false;
    }
    check(status, "cudaEventQuery");
    return true;
}

double elapsed_ms(const Event& begin, const Event& end) {
    float result = 0.0f;
    check(cudaEventElapsedTime(&result, static_cast<cudaEvent_t>(begin.handle()),
                               static_cast<cudaEvent_t>(end.handle())),
          "cudaEventElapsedTime");
    return result;
}

void wait_for(Stream stream, void* event) {
    check(cudaStreamWaitEvent(native(stream), static_cast<cudaEvent_t>(event), 0),
          "cudaStreamWaitEvent");
}

}  // namespace moecore::cuda
