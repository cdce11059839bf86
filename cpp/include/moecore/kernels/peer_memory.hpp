#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "moecore/kernels/device_queue.hpp"

namespace moecore::cuda {

/// What names an allocation or an event of this process to another one of the same host.
using IpcHandle = std::array<char, 64>;

/// Where `data` lies: in which allocation, and how far from its start.
struct ExportedMemory {
    IpcHandle allocation;
    size_t offset;
    uint64_t start;  ///< of the allocation, an address of its owner
    size_t bytes;    ///< of the allocation
};

/// `data`: device memory that allocate() gave, or within it. Throws CudaError.
ExportedMemory export_memory(const void* data);

/// Another process' allocation in this one's address space, reached from the current device.
class PeerMemory {
public:
    explicit PeerMemory(const IpcHandle& allocation);  ///< Throws CudaError.
    ~PeerMemory();
    PeerMemory(const PeerMemory&) = delete;
    PeerMemory& operator=(const PeerMemory&) = delete;

    char* data() const { return static_cast<char*>(data_); }

private:
    void* data_ = nullptr;
};

/// An event that other processes can wait for, and theirs in this process.
IpcHandle export_event(const Event& event);  ///< REQUIRES: made by Event::shared
Event open_event(const IpcHandle& handle, int device);

/// The PCI bus id of GPU `device`, the same in every process.
std::string bus_id(int device);

/// GPU with that bus id, -1 if this process does not see it.
int device_with(const std::string& bus_id);

/// Lets the current device reach memory of `peer`. Returns false if it cannot.
bool reach(int peer);

/// Waits for all work of the current device.
void wait_for_device();

}  // namespace moecore::cuda
