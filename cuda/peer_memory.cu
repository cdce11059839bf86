// Memory and events of other processes and GPUs of this host.
//
//   reads, writes  nothing
//
// No kernels, any architecture.

#include "moecore/kernels/peer_memory.hpp"

#include <cstring>

#include "common/driver.hpp"
#include "moecore/kernels/memory.hpp"

namespace moecore::cuda {
ExportedMemory export_memory(const void* data) {
    static const PFN_cuMemGetAddressRange_v3020 address_range =
        find_in_driver<PFN_cuMemGetAddressRange_v3020>("cuMemGetAddressRange");
    const auto address = reinterpret_cast<CUdeviceptr>(data);
    CUdeviceptr start = 0;
    size_t bytes = 0;
    const CUresult result = address_range(&start, &bytes, address);
    if (result != CUDA_SUCCESS)
        throw CudaError(
            concat("cuMemGetAddressRange failed with error ", static_cast<int>(result)));
    cudaIpcMemHandle_t handle;
    check(cudaIpcGetMemHandle(&handle, reinterpret_cast<void*>(start)), "cudaIpcGetMemHandle");
    ExportedMemory exported{
        .allocation = {}, .offset = address - start, .start = start, .bytes = bytes};
    static_assert(sizeof handle == sizeof exported.allocation);
    std::memcpy(exported.allocation.data(), &handle, sizeof handle);
    return exported;
}

PeerMemory::PeerMemory(const IpcHandle& allocation) {
    cudaIpcMemHandle_t handle;
    std::memcpy(&handle, allocation.data(), sizeof handle);
    check(cudaIpcOpenMemHandle(&data_, handle, cudaIpcMemLazyEnablePeerAccess),
          "cudaIpcOpenMemHandle");
}

PeerMemory::~PeerMemory() {
    // Its owner, or at process exit the driver, may be gone first.
    cudaIpcCloseMemHandle(data_);
    cudaGetLastError();
}

IpcHandle export_event(const Event& event) {
    cudaIpcEventHandle_t handle;
    check(cudaIpcGetEventHandle(&handle, static_cast<cudaEvent_t>(event.handle())),
          "cudaIpcGetEventHandle");
    IpcHandle result;
    static_assert(sizeof handle == sizeof result);
    std::memcpy(result.data(), &handle, sizeof handle);
    return result;
}

Event open_event(const IpcHandle& handle, int device) {
    const DeviceScope scope(device);
    cudaIpcEventHandle_t native_handle;
    std::memcpy(&native_handle, handle.data(), sizeof native_handle);
    cudaEvent_t event = nullptr;
    check(cudaIpcOpenEventHandle(&event, native_handle), "cudaIpcOpenEventHandle");
    return Event::adopt(event, device);
}

std::string bus_id(int device) {
    char id[16] = {};
    check(cudaDeviceGetPCIBusId(id, sizeof id, device), "cudaDeviceGetPCIBusId");
    return id;
}

int device_with(const std::string& bus_id) {
    int device = -1;
    if (cudaDeviceGetByPCIBusId(&device, bus_id.c_str()) == cudaSuccess) return device;
    cudaGetLastError();
    return -1;
}

bool reach(int peer) {
    int device = 0, can = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    if (device == peer) return true;
    check(cudaDeviceCanAccessPeer(&can, device, peer), "cudaDeviceCanAccessPeer");
    if (can == 0) return false;
    const cudaError_t status = cudaDeviceEnablePeerAccess(peer, 0);
    if (status == cudaErrorPeerAccessAlreadyEnabled)
        cudaGetLastError();
    else
        check(status, "cudaDeviceEnablePeerAccess");
    return true;
}

void wait_for_device() { check(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); }

}  // namespace moecore::cuda
