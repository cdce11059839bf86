#pragma once

// A runner without dependencies, and the little that the tests share.

#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#include "moecore/dtype.hpp"
#include "moecore/error.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore::test {

constexpr DType kF32 = DType::kFloat32;
constexpr DType kBf16 = DType::kBFloat16;
constexpr double kEps = 0x1p-24;  // half a unit in the last place of float32

inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

struct Test {
    std::string name;
    void (*run)();
};

void add_topk_routing_tests(std::vector<Test>& tests);
void add_route_and_sort_tests(std::vector<Test>& tests);
void add_sort_by_expert_tests(std::vector<Test>& tests);
void add_grouped_gemm_tests(std::vector<Test>& tests);
void add_gemm_amx_tests(std::vector<Test>& tests);
void add_gemm_config_tests(std::vector<Test>& tests);
void add_grouped_gemm_argument_tests(std::vector<Test>& tests);
void add_packed_files_tests(std::vector<Test>& tests);
void add_packed_weights_tests(std::vector<Test>& tests);
void add_combine_tests(std::vector<Test>& tests);
void add_decoder_layer_tests(std::vector<Test>& tests);
void add_draw_tokens_tests(std::vector<Test>& tests);
void add_dispatch_plan_tests(std::vector<Test>& tests);
void add_transport_tests(std::vector<Test>& tests);
void add_expert_parallel_tests(std::vector<Test>& tests);
void add_ep_schedule_tests(std::vector<Test>& tests);
void add_gather_rows_tests(std::vector<Test>& tests);
void add_embedding_tests(std::vector<Test>& tests);
void add_lent_memory_tests(std::vector<Test>& tests);
void add_moe_layer_tests(std::vector<Test>& tests);
void add_norm_and_rotate_tests(std::vector<Test>& tests);
void add_paged_attention_tests(std::vector<Test>& tests);
void add_rms_norm_tests(std::vector<Test>& tests);
void add_rotary_embedding_tests(std::vector<Test>& tests);

/// Throws with the place of the call unless `condition` holds.
void expect(bool condition, const std::string& message,
            std::source_location where = std::source_location::current());

/// `call` must throw an InvalidArgument whose text contains `text`.
template <std::invocable Call>
void expect_invalid(Call&& call, const std::string& text,
                    std::source_location where = std::source_location::current()) {
    std::string got = "no error";
    try {
        call();
    } catch (const InvalidArgument& error) {
        got = error.what();
    }
    expect(got.find(text) != std::string::npos, "wanted '" + text + "', got '" + got + "'", where);
}

/// The nearest bfloat16, ties to even. Finite values only.
inline uint16_t to_bf16(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// Numbers on the heap in an allocation of exactly their size, so that AddressSanitizer sees an
/// overrun by one.
class Array {
public:
    Array() = default;
    Array(DType dtype, int64_t count)
        : dtype_(dtype), count_(count), bytes_(static_cast<size_t>(count) * size_of(dtype)) {}

    int64_t size() const { return count_; }
    DType dtype() const { return dtype_; }
    void* data() { return bytes_.data(); }
    const std::vector<unsigned char>& bytes() const { return bytes_; }

    double operator[](int64_t i) const {
        switch (dtype_) {
            case DType::kFloat32:
                return load<float>(i);
            case DType::kInt32:
                return load<int32_t>(i);
            case DType::kInt64:
                return static_cast<double>(load<int64_t>(i));
            case DType::kBFloat16:
                break;
        }
        return std::bit_cast<float>(uint32_t{load<uint16_t>(i)} << 16);
    }
    void set(int64_t i, double value) {
        switch (dtype_) {
            case DType::kFloat32:
                return store(i, static_cast<float>(value));
            case DType::kInt32:
                return store(i, static_cast<int32_t>(value));
            case DType::kInt64:
                return store(i, static_cast<int64_t>(value));
            case DType::kBFloat16:
                return store(i, to_bf16(static_cast<float>(value)));
        }
    }
    void fill(double value) {
        for (int64_t i = 0; i < count_; ++i) set(i, value);
    }

    TensorView view(std::initializer_list<int64_t> shape) { return {data(), dtype_, shape}; }
    /// A matrix whose rows begin `row_stride` elements apart.
    TensorView rows(int64_t num_rows, int64_t width, int64_t row_stride) {
        TensorView view(data(), dtype_, {num_rows, width});
        view.strides[0] = row_stride;
        return view;
    }

private:
    template <typename T>
    T load(int64_t i) const {
        T value;
        std::memcpy(&value, bytes_.data() + static_cast<size_t>(i) * sizeof(T), sizeof(T));
        return value;
    }
    template <typename T>
    void store(int64_t i, T value) {
        std::memcpy(bytes_.data() + static_cast<size_t>(i) * sizeof(T), &value, sizeof(T));
    }

    DType dtype_ = DType::kFloat32;
    int64_t count_ = 0;
    std::vector<unsigned char> bytes_;
};

/// Elements of a matrix with a row stride: nothing after the last row.
constexpr int64_t strided_size(int64_t num_rows, int64_t width, int64_t row_stride) {
    return num_rows == 0 ? 0 : (num_rows - 1) * row_stride + width;
}

/// Uniform in [-range, range], the same numbers on every platform.
class Random {
public:
    explicit Random(uint32_t seed) : engine_(seed) {}
    double uniform(double range) {
        return range * (static_cast<double>(engine_()) / 2147483648.0 - 1.0);
    }
    int64_t below(int64_t count) { return static_cast<int64_t>(engine_()) % count; }
    Array array(DType dtype, int64_t count, double range = 1.0) {
        Array result(dtype, count);
        for (int64_t i = 0; i < count; ++i) result.set(i, uniform(range));
        return result;
    }

private:
    std::mt19937 engine_;
};

inline Array int_array(DType dtype, const std::vector<int64_t>& values) {
    Array result(dtype, static_cast<int64_t>(values.size()));
    for (int64_t i = 0; i < result.size(); ++i)
        result.set(i, static_cast<double>(values[static_cast<size_t>(i)]));
    return result;
}

/// |actual - wanted| <= bound, plus one rounding to `actual`'s dtype.
inline void expect_close(double actual, double wanted, double bound, DType dtype,
                         const std::string& what,
                         std::source_location where = std::source_location::current()) {
    // Half a unit in the last place: 8 significant bits in bfloat16, 24 in float32.
    const double rounding = dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-24;
    const double allowed = bound + (std::abs(wanted) + bound) * rounding + 1e-37;
    if (!(std::abs(actual - wanted) <= allowed))
        expect(false, concat(what, ": got ", actual, ", wanted ", wanted, " within ", allowed),
               where);
}

inline constexpr Device kOtherDevice{DeviceType::kCuda, 0};

inline TensorView on_other_device(TensorView view) {
    view.device = kOtherDevice;
    return view;
}

}  // namespace moecore::test
