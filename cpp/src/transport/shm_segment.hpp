#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace moecore {

/// A named piece of shared memory, mapped. The first rank creates it and holds a lock on it for as
/// long as it lives; whoever opens a segment without such a lock has found what a crash left.
class ShmSegment {
public:
    /// Creates `name` of zeros, all of it reserved. Replaces a stale one. Throws InvalidArgument if
    /// a living run uses the name or there is too little memory.
    static std::shared_ptr<ShmSegment> create(const std::string& name, size_t bytes);

    /// The segment `name`, or nullptr where there is none yet, or only a stale one.
    static std::shared_ptr<ShmSegment> open(const std::string& name);

    ~ShmSegment();
    ShmSegment(const ShmSegment&) = delete;
    ShmSegment& operator=(const ShmSegment&) = delete;

    void* data() const { return data_; }
    size_t size_bytes() const { return bytes_; }

    /// Removes the name, if it still is this segment's. The memory lives on while it is mapped.
    void unlink() noexcept;

private:
    ShmSegment(std::string name, int file) : name_(std::move(name)), file_(file) {}
    void map(size_t bytes);

    std::string name_;
    int file_;
    void* data_ = nullptr;
    size_t bytes_ = 0;
    bool is_owner_ = false;
};

}  // namespace moecore
