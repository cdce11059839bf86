// Every cuda:: entry point of a build without CUDA: callers need no #ifdef, users a clear error.

#include <string>

#include "moecore/error.hpp"
#include "moecore/kernels/address_rows.hpp"
#include "moecore/kernels/combine.hpp"
#include "moecore/kernels/device_queue.hpp"
#include "moecore/kernels/draw_tokens.hpp"
#include "moecore/kernels/embedding.hpp"
#include "moecore/kernels/gather_rows.hpp"
#include "moecore/kernels/grouped_gemm.hpp"
#include "moecore/kernels/locate_results.hpp"
#include "moecore/kernels/memory.hpp"
#include "moecore/kernels/norm_and_rotate.hpp"
#include "moecore/kernels/paged_attention.hpp"
#include "moecore/kernels/peer_memory.hpp"
#include "moecore/kernels/plan_routes.hpp"
#include "moecore/kernels/rms_norm.hpp"
#include "moecore/kernels/rotary_embedding.hpp"
#include "moecore/kernels/rotate_and_cache.hpp"
#include "moecore/kernels/route_and_sort.hpp"
#include "moecore/kernels/share_rows.hpp"
#include "moecore/kernels/signals.hpp"
#include "moecore/kernels/sort_by_expert.hpp"
#include "moecore/kernels/topk_routing.hpp"
#include "moecore/kernels/write_kv_cache.hpp"

namespace moecore::cuda {
namespace {

[[noreturn]] void throw_no_cuda(const char* op) {
    throw UnsupportedError(concat(op,
                                  ": this build of moecore has no CUDA kernels; rebuild with nvcc "
                                  "on PATH or MOECORE_CUDA=ON"));
}

}  // namespace

void topk_routing(const TopkRoutingArgs&, Stream) { throw_no_cuda("topk_routing"); }
void share_rows(const std::array<ShareRowsArgs, 2>&, Stream) { throw_no_cuda("share_rows"); }
void meet(const SignalArgs&, Stream) { throw_no_cuda("meet"); }
void sort_by_expert(std::span<const SortByExpertArgs>, Stream) { throw_no_cuda("sort_by_expert"); }
void route_and_sort(const RouteAndSortArgs&, Stream) { throw_no_cuda("route_and_sort"); }
void grouped_gemm(const GroupedGemmArgs&, Stream) { throw_no_cuda("grouped_gemm"); }
void address_rows(const std::array<AddressRowsArgs, 2>&, Stream) { throw_no_cuda("address_rows"); }
void address_slots(const AddressSlotsArgs&, Stream) { throw_no_cuda("address_slots"); }
void combine(const CombineArgs&, Stream) { throw_no_cuda("combine"); }
void draw_tokens(const DrawTokensArgs&, Stream) { throw_no_cuda("draw_tokens"); }
void embedding(const EmbeddingArgs&, Stream) { throw_no_cuda("embedding"); }
void gather_rows(const GatherRowsArgs&, Stream) { throw_no_cuda("gather_rows"); }
void locate_results(const LocateResultsArgs&, Stream) { throw_no_cuda("locate_results"); }
void key_routes(const KeyRoutesArgs&, Stream) { throw_no_cuda("key_routes"); }
void place_rows(const PlaceRowsArgs&, Stream) { throw_no_cuda("place_rows"); }
void rms_norm(const RmsNormArgs&, Stream) { throw_no_cuda("rms_norm"); }
void norm_and_rotate(const NormAndRotateArgs&, Stream) { throw_no_cuda("norm_and_rotate"); }
void rotary_embedding(const RotaryEmbeddingArgs&, Stream) { throw_no_cuda("rotary_embedding"); }
void rotate_and_cache(const RotateAndCacheArgs&, Stream) { throw_no_cuda("rotate_and_cache"); }

void write_kv_cache(const WriteKvCacheArgs&, Stream) { throw_no_cuda("write_kv_cache"); }
void paged_attention(const PagedAttentionArgs&, Stream) { throw_no_cuda("paged_attention"); }

DeviceScope::DeviceScope(int) {}
DeviceScope::~DeviceScope() {}

void* allocate(int, size_t) { throw_no_cuda("allocate"); }
void* allocate_zeros(int, size_t) { throw_no_cuda("allocate"); }
void deallocate(void*, int) noexcept {}

int device_count() { return 0; }
void copy(void*, const void*, size_t, Stream) { throw_no_cuda("copy"); }
void fill(void*, unsigned char, size_t, Stream) { throw_no_cuda("fill"); }
PinnedBuffer::~PinnedBuffer() {}
void* PinnedBuffer::reserve(size_t) { throw_no_cuda("PinnedBuffer"); }
OwnedStream::OwnedStream(int) { throw_no_cuda("OwnedStream"); }
OwnedStream::~OwnedStream() {}
Event::Event(int, Use) { throw_no_cuda("Event"); }
Event::~Event() {}
void Event::record(Stream) { throw_no_cuda("Event"); }
bool Event::is_done() const { throw_no_cuda("Event"); }
double elapsed_ms(const Event&, const Event&) { throw_no_cuda("elapsed_ms"); }
Event Event::adopt(void*, int) { throw_no_cuda("Event"); }
void wait_for(Stream, void*) { throw_no_cuda("wait_for"); }

ExportedMemory export_memory(const void*) { throw_no_cuda("export_memory"); }
PeerMemory::PeerMemory(const IpcHandle&) { throw_no_cuda("PeerMemory"); }
PeerMemory::~PeerMemory() {}
IpcHandle export_event(const Event&) { throw_no_cuda("export_event"); }
Event open_event(const IpcHandle&, int) { throw_no_cuda("open_event"); }
std::string bus_id(int) { throw_no_cuda("bus_id"); }
int device_with(const std::string&) { throw_no_cuda("device_with"); }
bool reach(int) { throw_no_cuda("reach"); }
void wait_for_device() { throw_no_cuda("wait_for_device"); }

std::string toolkit_version() { return ""; }

}  // namespace moecore::cuda
