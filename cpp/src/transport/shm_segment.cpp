#include "transport/shm_segment.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "moecore/error.hpp"

namespace moecore {
namespace {

constexpr mode_t kOwnerOnly = 0600;

std::string error_text() { return std::strerror(errno); }

/// Whether a living process holds the creator's lock. An opener tests with a lock of its own for a
/// moment, so a lock must be seen several times to count.
bool is_in_use(int file) {
    for (int attempt = 0; attempt < 20; ++attempt) {
        if (flock(file, LOCK_EX | LOCK_NB) == 0) {
            flock(file, LOCK_UN);
            return false;
        }
        usleep(5000);
    }
    return true;
}

/// The name is free afterwards, or InvalidArgument.
void remove_stale(const std::string& name) {
    const int file = shm_open(name.c_str(), O_RDWR, kOwnerOnly);
    if (file < 0) {
        require(errno == ENOENT, "make_shm_transport: name must be a segment of this user, got ",
                name, ": ", error_text());
        return;
    }
    const bool in_use = is_in_use(file);
    if (!in_use) shm_unlink(name.c_str());
    close(file);
    require(!in_use, "make_shm_transport: name must not belong to a running group, got ", name,
            ". Choose another name for this run.");
}

std::string free_megabytes() {
    struct statvfs info{};
    if (statvfs("/dev/shm", &info) != 0) return "an unknown number of";
    return concat(info.f_bavail * info.f_frsize >> 20);
}

}  // namespace

void ShmSegment::map(size_t bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    if (data_ == MAP_FAILED) {
        data_ = nullptr;
        throw std::runtime_error(
            concat("mmap of ", bytes, " bytes of ", name_, ": ", error_text()));
    }
    bytes_ = bytes;
}

std::shared_ptr<ShmSegment> ShmSegment::create(const std::string& name, size_t bytes) {
    int file = -1;
    for (int attempt = 0; file < 0; ++attempt) {
        file = shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, kOwnerOnly);
        if (file >= 0) break;
        require(errno == EEXIST && attempt < 3,
                "make_shm_transport: name must be one that can be "
                "created in /dev/shm, got ",
                name, ": ", error_text());
        remove_stale(name);
    }
    std::shared_ptr<ShmSegment> segment(new ShmSegment(name, file));
    segment->is_owner_ = true;
    while (flock(file, LOCK_EX) != 0 && errno == EINTR) {
    }
    // Reserved now: a full /dev/shm must be an error here, not a SIGBUS at the first touch.
    const int status = posix_fallocate(file, 0, static_cast<off_t>(bytes));
    require(status == 0, "make_shm_transport: /dev/shm must have ", (bytes >> 20) + 1,
            " MB free for this group, got ", free_megabytes(), " MB (", std::strerror(status),
            "). Enlarge it (docker run --shm-size) or pass a smaller ring_bytes.");
    segment->map(bytes);
    return segment;
}

std::shared_ptr<ShmSegment> ShmSegment::open(const std::string& name) {
    const int file = shm_open(name.c_str(), O_RDWR, kOwnerOnly);
    if (file < 0) {
        require(errno == ENOENT, "make_shm_transport: name must be a segment of this user, got ",
                name, ": ", error_text());
        return nullptr;
    }
    std::shared_ptr<ShmSegment> segment(new ShmSegment(name, file));
    if (flock(file, LOCK_SH | LOCK_NB) == 0) {  // its creator is gone, or not yet ready
        flock(file, LOCK_UN);
        return nullptr;
    }
    struct stat info{};
    if (fstat(file, &info) != 0 || info.st_size == 0) return nullptr;
    segment->map(static_cast<size_t>(info.st_size));
    return segment;
}

void ShmSegment::unlink() noexcept {
    struct stat own{}, named{};
    const int file = shm_open(name_.c_str(), O_RDONLY, kOwnerOnly);
    if (file < 0) return;
    if (fstat(file_, &own) == 0 && fstat(file, &named) == 0 && own.st_ino == named.st_ino)
        shm_unlink(name_.c_str());
    close(file);
}

ShmSegment::~ShmSegment() {
    if (is_owner_) unlink();
    if (data_ != nullptr) munmap(data_, bytes_);
    close(file_);
}

}  // namespace moecore
