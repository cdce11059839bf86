#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <exception>

#include "cpu/panels.hpp"
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

/// Bytes begin .. begin + count - 1 of a matrix, the one of that index among all given.
void read_bytes(const FileMatrix& matrix, size_t index, int64_t begin, int64_t count,
                char* target) {
    for (int64_t done = 0; done < count;) {
        const ssize_t got = pread(matrix.descriptor, target + done,
                                  static_cast<size_t>(count - done), matrix.offset + begin + done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw FileReadError(index, begin + done, errno);
        if (got == 0) throw FileReadError(index, bytes_of(matrix, begin + done), 0);
        done += got;
    }
}

/// Rows first .. first + count - 1 of a group's matrices, `index` the first of them.
void read_rows(std::span<const FileMatrix> matrices, size_t index, int64_t row_bytes, int64_t first,
               int64_t count, char* target) {
    for (const FileMatrix& matrix : matrices) {
        const int64_t here = std::clamp<int64_t>(matrix.num_rows - first, 0, count);
        if (here > 0) read_bytes(matrix, index, first * row_bytes, here * row_bytes, target);
        ++index;
        first = std::max<int64_t>(first - matrix.num_rows, 0);
        count -= here;
        target += here * row_bytes;
    }
}

/// Panels of one group that a thread reads and packs.
struct Piece {
    std::span<const FileMatrix> matrices;  ///< of the whole group
    size_t first_matrix;                   ///< its index among those of all groups
    cpu::PanelLayout layout;               ///< of the whole group
    int64_t panel, num_panels;
    char* target;  ///< of the first panel
};

int64_t element_bytes(const cpu::PanelLayout& layout) {
    return static_cast<int64_t>(size_of(layout.dtype));
}

int64_t panel_bytes(const cpu::PanelLayout& layout) {
    return layout.panel_elements() * element_bytes(layout);
}

/// `group` becomes pieces; its panel, num_panels and target are those of all of it.
void append_pieces(std::vector<Piece>& pieces, const Piece& group) {
    const int64_t count = std::max<int64_t>(kPieceBytes / panel_bytes(group.layout), 1);
    for (int64_t panel = 0; panel < group.num_panels; panel += count) {
        Piece& piece = pieces.emplace_back(group);
        piece.panel = panel;
        piece.num_panels = std::min(count, group.num_panels - panel);
        piece.target += panel * panel_bytes(group.layout);
    }
}

void pack_piece(const cpu::KernelTable& table, const Piece& piece) {
    const cpu::PanelLayout& whole = piece.layout;
    const int64_t row_bytes = whole.k_dim * element_bytes(whole);
    const int64_t first = piece.panel * whole.outputs_per_panel();
    const int64_t rows =
        std::min(piece.num_panels * whole.outputs_per_panel(), whole.num_outputs() - first);
    const int64_t sources = whole.gated ? 2 : 1;
    char* memory = scratch(sources * rows * row_bytes);
    for (int64_t i = 0; i < sources; ++i)
        read_rows(piece.matrices, piece.first_matrix, row_bytes, i * whole.num_outputs() + first,
                  rows, memory + i * rows * row_bytes);
    const cpu::PanelLayout layout{sources * rows, whole.k_dim, whole.gated, whole.dtype};
    const cpu::PanelSource source{memory, whole.gated ? memory + rows * row_bytes : nullptr,
                                  whole.k_dim, 1, true};
    for (int64_t i = 0; i < piece.num_panels; ++i)
        cpu::pack_panel(table, layout, source, i, 0, whole.k_dim,
                        piece.target + i * panel_bytes(whole), true);
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

void PackedWeights::pack_files(std::span<const FilePacking> packings, int num_threads) {
    kCheck.that(num_threads >= 1, "num_threads must be >= 1, got ", num_threads);
    std::vector<Piece> pieces;
    size_t num_matrices = 0;
    for (const auto& [weights, group, matrices] : packings) {
        char* target = weights->group_data(group);
        check_matrices(matrices, weights->n_, weights->k_dim_);
        const cpu::PanelLayout layout{weights->n_, weights->k_dim_, weights->gated_,
                                      weights->dtype_};
        append_pieces(pieces, {matrices, num_matrices, layout, 0, layout.num_panels(), target});
        num_matrices += matrices.size();
    }
    const cpu::KernelTable& table = cpu::kernels();
    std::atomic<bool> failed = false;
    std::exception_ptr failure;
    // In the order of the files, as disks like it.
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
    for (const Piece& piece : pieces) {
        if (failed.load(std::memory_order_relaxed)) continue;
        try {
            pack_piece(table, piece);
        } catch (...) {
            if (!failed.exchange(true)) failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace moecore
