#include <cstring>
#include <new>

#include "moecore/buffer.hpp"
#include "moecore/error.hpp"
#include "transport/host_transport.hpp"
#include "transport/peer.hpp"
#include "transport/ring_size.hpp"

namespace moecore {
namespace {

void check_size(int size) {
    require(size >= 1 && size <= kMaxHostRanks, "make_in_process_transports: size must be in [1, ",
            kMaxHostRanks, "], got ", size);
}

}  // namespace

std::vector<std::unique_ptr<Transport>> make_in_process_transports(int size, Device device) {
    check_size(size);
    const size_t ring_bytes = default_ring_bytes(size);
    const size_t bytes = Mailboxes::bytes_for(size, ring_bytes);
    auto memory = std::make_shared<Buffer>(Device{}, bytes);
    std::memset(memory->data(), 0, bytes);
    const Mailboxes boxes(memory->data(), size, ring_bytes);
    const ProcessId self = ProcessId::current();
    std::vector<std::unique_ptr<Transport>> transports;
    for (int r = 0; r < size; ++r) {
        RankCell& cell = boxes.rank(r);
        cell.process_start = self.start_time;
        cell.process_namespace = self.id_namespace;
        cell.process = self.id;
        auto host = std::make_unique<HostTransport>("in_process", memory, boxes, r, true);
        if (device.type == DeviceType::kCuda)
            transports.push_back(make_unmet_peer_transport(
                {.hosts = std::move(host), .device = device}, "in_process"));
        else
            transports.push_back(std::move(host));
    }
    return transports;
}

}  // namespace moecore
