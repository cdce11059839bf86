#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <exception>

#include "cpu/panels.hpp"
#include "cpu/parallel.hpp"
#include "moecore/packed_weights.hpp"
#include "ops/check.hpp"

namespace moecore {
namespace {

const Check kCheck("PackedWeights");

/// What a thread reads before it packs that: it should stay in the thread's own cache.
constexpr int64_t kPieceBytes = 512 << 10;

/// Of any file; an offset within a matrix can be added to it.
constexpr int64_t kMaxOffset = int64_t{1} << 62;

void check_matrices(std::span<const FileMatrix> matrices, int64_t n, int64_t k_dim) {
    int64_t num_rows = 0;
    for (const FileMatrix& matrix : matrices) {
        kCheck.that(matrix.num_rows >= 1 && matrix.num_rows <= n - num_rows, "matrices must have ",
                    n, " rows together, got one of ", matrix.num_rows, " after ", num_rows);
        kCheck.that(matrix.k_dim == k_dim, "matrices must have k_dim ", k_dim, ", got ",
                    matrix.k_dim);
        kCheck.that(matrix.offset >= 0 && matrix.offset <= kMaxOffset,
                    "offset must be in [0, 2^62], got ", matrix.offset);
        num_rows += matrix.num_rows;
    }
    kCheck.that(num_rows == n, "matrices must have ", n, " rows together, got ", num_rows);
}

/// Memory of this thread that its next call overwrites.
char* scratch(int64_t bytes) {
    thread_local Buffer buffer;
    const auto size = static_cast<size_t>(bytes);
    if (buffer.size_bytes() < size) buffer = Buffer({}, size);
    return static_cast<char*>(buffer.data());
}

/// How much of a matrix is in its file, which ends before byte `end` of it.
int64_t bytes_of(const FileMatrix& matrix, int64_t end) {
    struct stat status{};
    if (fstat(matrix.descriptor, &status) != 0) return end;
    return std::clamp<int64_t>(status.st_size - matrix.offset, 0, end);
}

/// Bytes begin .. begin + count - 1 of one of the matrices.
void read_bytes(std::span<const FileMatrix> matrices, size_t index, int64_t begin, int64_t count,
                char* target) {
    const FileMatrix& matrix = matrices[index];
    for (int64_t done = 0; done < count;) {
        const ssize_t got = pread(matrix.descriptor, target + done,
                                  static_cast<size_t>(count - done), matrix.offset + begin + done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw FileReadError(index, begin + done, errno);
        if (got == 0) throw FileReadError(index, bytes_of(matrix, begin + done), 0);
        done += got;
    }
}

/// Rows first .. first + count - 1 of all matrices' rows.
void read_rows(std::span<const FileMatrix> matrices, int64_t row_bytes, int64_t first,
               int64_t count, char* target) {
    for (size_t index = 0; count > 0; ++index) {
        const int64_t here = std::clamp<int64_t>(matrices[index].num_rows - first, 0, count);
        if (here > 0) read_bytes(matrices, index, first * row_bytes, here * row_bytes, target);
        first = std::max<int64_t>(first - matrices[index].num_rows, 0);
        count -= here;
        target += here * row_bytes;
    }
}

std::string message_of(int64_t found, int error_number) {
    const std::string where = concat("after ", found, " bytes of a matrix");
    if (error_number == 0) return "PackedWeights: the file ended " + where;
    return concat("PackedWeights: ", std::strerror(error_number), " ", where);
}

}  // namespace

FileReadError::FileReadError(size_t matrix, int64_t found, int error_number)
    : std::runtime_error(message_of(found, error_number)),
      matrix_(matrix),
      found_(found),
      error_number_(error_number) {}

void PackedWeights::pack_files(int64_t group, std::span<const FileMatrix> matrices) {
    char* target = group_data(group);
    check_matrices(matrices, n_, k_dim_);
    const cpu::KernelTable& table = cpu::kernels();
    const cpu::PanelLayout whole{n_, k_dim_, gated_, dtype_};
    const auto element_bytes = static_cast<int64_t>(size_of(dtype_));
    const int64_t row_bytes = k_dim_ * element_bytes;
    const int64_t panel_rows = whole.outputs_per_panel();
    const int64_t sources = gated_ ? 2 : 1;
    const int64_t piece_panels =
        std::max<int64_t>(kPieceBytes / (cpu::kPanelColumns * row_bytes), 1);

    const auto pack_piece = [&](int64_t begin, int64_t end) {  // panels
        const int64_t first = begin * panel_rows;
        const int64_t rows = std::min(end * panel_rows, whole.num_outputs()) - first;
        char* memory = scratch(sources * rows * row_bytes);
        for (int64_t i = 0; i < sources; ++i)
            read_rows(matrices, row_bytes, i * whole.num_outputs() + first, rows,
                      memory + i * rows * row_bytes);
        const cpu::PanelLayout piece{sources * rows, k_dim_, gated_, dtype_};
        const cpu::PanelSource source{memory, gated_ ? memory + rows * row_bytes : nullptr, k_dim_,
                                      1, true};
        for (int64_t panel = begin; panel < end; ++panel)
            cpu::pack_panel(table, piece, source, panel - begin, 0, k_dim_,
                            target + panel * whole.panel_elements() * element_bytes, true);
    };
    std::atomic<bool> failed = false;
    std::exception_ptr failure;
    cpu::parallel_ranges(whole.num_panels(), piece_panels, [&](int64_t begin, int64_t end) {
        if (failed.load(std::memory_order_relaxed)) return;
        try {
            pack_piece(begin, end);
        } catch (...) {
            if (!failed.exchange(true)) failure = std::current_exception();
        }
    });
    if (failure) std::rethrow_exception(failure);
}

}  // namespace moecore
