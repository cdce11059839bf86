#pragma once

// One rank of a group alone, its peers and the link to them emulated.

#include <vector>

#include "gpu.hpp"
#include "moecore/buffer.hpp"
#include "moecore/transport.hpp"

namespace moecore::bench {

/// Emulation of a link, not a measurement of one. A layer runs once with all ranks of `inner`, and
/// what they told and sent this rank is remembered; then this rank runs the same layer alone.
class EmulatedLink : public Transport {
public:
    enum class Mode : uint8_t {
        kRecord,  ///< the group's own exchange, remembered
        kEcho,    ///< the answers of hosts at once; no row moves, those recorded are in place
        kLink,  ///< the answers of hosts at once; rows arrive at the link's pace: copied from local
                ///< memory, or, with no blocks that copy, those recorded are in place
    };

    EmulatedLink(Transport& inner, const Link& link) : inner_(inner), link_(link) {}

    /// To be called before each layer.
    void begin(Mode mode);

    int rank() const override { return inner_.rank(); }
    int size() const override { return inner_.size(); }
    const char* kind() const override { return "emulated link"; }
    Device device() const override { return inner_.device(); }
    void all_gather(const char* phase, const void* mine, void* all, size_t bytes) override;
    void all_to_all_v(const char* phase, const RowsToSend& send, const RowsToReceive& recv,
                      size_t row_bytes, Stream stream) override;
    void all_gather_rows(const char* phase, const void* mine, void* all, size_t bytes,
                         Stream stream) override;
    void synchronize(const char* phase, Stream stream) override {
        inner_.synchronize(phase, stream);
    }
    void abort(const std::string& reason) noexcept override { inner_.abort(reason); }

private:
    void pass_on(const TransportError& error) override { inner_.abort_because(error); }
    void remember(const void* rows, size_t bytes, Stream stream);
    /// Lets the rows of the next recorded call arrive; `remote_bytes` of them cross the link.
    void arrive(void* target, double remote_bytes, Stream stream);

    Transport& inner_;
    Link link_;
    Mode mode_ = Mode::kRecord;
    std::vector<std::vector<char>> answers_;  ///< of all_gather, by call
    std::vector<Buffer> arrived_;             ///< rows of device(), by call
    size_t next_answer_ = 0, next_arrival_ = 0;
};

}  // namespace moecore::bench
