#include "roofs.hpp"

#include <omp.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "harness.hpp"
#include "moecore/build_info.hpp"
#include "moecore/threads.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moecore::bench {
namespace {

#if defined(__x86_64__)
__attribute__((target("avx512f"))) uint64_t sum_avx512(const char* p, size_t bytes) {
    __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                       _mm512_setzero_si512()};
    for (size_t i = 0; i + 256 <= bytes; i += 256)
        for (int j = 0; j < 4; ++j) {
            _mm_prefetch(p + i + 64 * j + 2048, _MM_HINT_T0);
            sums[j] = _mm512_add_epi64(sums[j], _mm512_loadu_si512(p + i + 64 * j));
        }
    for (int j = 1; j < 4; ++j) sums[0] = _mm512_add_epi64(sums[0], sums[j]);
    alignas(64) uint64_t lanes[8];
    _mm512_store_si512(lanes, sums[0]);
    return lanes[0] ^ lanes[7];
}

constexpr int kChains = 24;  ///< independent sums: more than latency times throughput
constexpr int64_t kSteps = 200000;

constexpr int kTileChains = 6;  ///< tile 6 and 7 are the factors

/// Only after the core has asked the system for tiles.
__attribute__((target("amx-tile,amx-bf16"))) float burn_amx(int64_t steps) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" : : "m"(config));
    for (int64_t i = 0; i < steps; ++i)
        asm volatile(
            "tdpbf16ps %tmm7, %tmm6, %tmm0\n\ttdpbf16ps %tmm7, %tmm6, %tmm1\n\t"
            "tdpbf16ps %tmm7, %tmm6, %tmm2\n\ttdpbf16ps %tmm7, %tmm6, %tmm3\n\t"
            "tdpbf16ps %tmm7, %tmm6, %tmm4\n\ttdpbf16ps %tmm7, %tmm6, %tmm5");
    asm volatile("tilerelease");
    return 0.0f;
}

__attribute__((target("avx512f,avx512bf16"))) float burn_bf16(int64_t steps) {
    __m512 sum[kChains];
#pragma GCC unroll 24
    for (int j = 0; j < kChains; ++j) sum[j] = _mm512_setzero_ps();
    const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
        for (int j = 0; j < kChains; ++j) {
            sum[j] = _mm512_dpbf16_ps(sum[j], x, x);
            asm volatile("" : "+v"(sum[j]));  // equal chains must stay separate
        }
    }
#pragma GCC unroll 24
    for (int j = 1; j < kChains; ++j) sum[0] = _mm512_add_ps(sum[0], sum[j]);
    return _mm512_cvtss_f32(sum[0]);
}

__attribute__((target("avx512f"))) float burn_f32_avx512(int64_t steps) {
    __m512 sum[kChains];
#pragma GCC unroll 24
    for (int j = 0; j < kChains; ++j) sum[j] = _mm512_setzero_ps();
    const __m512 x = _mm512_set1_ps(1.0f);
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
        for (int j = 0; j < kChains; ++j) {
            sum[j] = _mm512_fmadd_ps(x, x, sum[j]);
            asm volatile("" : "+v"(sum[j]));
        }
    }
#pragma GCC unroll 24
    for (int j = 1; j < kChains; ++j) sum[0] = _mm512_add_ps(sum[0], sum[j]);
    return _mm512_cvtss_f32(sum[0]);
}

__attribute__((target("avx2,fma"))) float burn_f32_avx2(int64_t steps) {
    __m256 sum[kChains / 2];
#pragma GCC unroll 12
    for (int j = 0; j < kChains / 2; ++j) sum[j] = _mm256_setzero_ps();
    const __m256 x = _mm256_set1_ps(1.0f);
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
        for (int j = 0; j < kChains / 2; ++j) {
            sum[j] = _mm256_fmadd_ps(x, x, sum[j]);
            asm volatile("" : "+v"(sum[j]));
        }
    }
#pragma GCC unroll 12
    for (int j = 1; j < kChains / 2; ++j) sum[0] = _mm256_add_ps(sum[0], sum[j]);
    return _mm256_cvtss_f32(sum[0]);
}
#endif

uint64_t sum_plain(const char* p, size_t bytes) {
    uint64_t sums[8] = {};
    for (size_t i = 0; i + 64 <= bytes; i += 64) {
        uint64_t lanes[8];
        std::memcpy(lanes, p + i, sizeof lanes);
        for (int j = 0; j < 8; ++j) sums[j] += lanes[j];
    }
    uint64_t all = 0;
    for (const uint64_t s : sums) all ^= s;
    return all;
}

}  // namespace

BandwidthProbe::BandwidthProbe(size_t bytes) : bytes_(bytes) {
    data_ = static_cast<char*>(std::aligned_alloc(size_t{2} << 20, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    madvise(data_, bytes, MADV_HUGEPAGE);
    std::memset(data_, 1, bytes);
}

BandwidthProbe::~BandwidthProbe() { std::free(data_); }

double BandwidthProbe::read_gbps() {
    const size_t total = size_t{128} << 20;
    if (next_ + total > bytes_) next_ = 0;
    const char* start = data_ + next_;
    next_ += total;
    const int threads = num_threads();
    const size_t share = total / static_cast<size_t>(threads);
    uint64_t result = 0;
    const double begin = now_us();
#pragma omp parallel num_threads(threads) reduction(^ : result)
    {
        const char* p = start + static_cast<size_t>(omp_get_thread_num()) * share;
#if defined(__x86_64__)
        result ^= __builtin_cpu_supports("avx512f") ? sum_avx512(p, share) : sum_plain(p, share);
#else
        result ^= sum_plain(p, share);
#endif
    }
    const double us = now_us() - begin;
    keep(result);
    return static_cast<double>(total) / us / 1e3;
}

double empty_region_us() {
    constexpr int kRegions = 200;
    const int threads = num_threads();
    std::vector<double> samples;
    for (int repeat = 0; repeat < 25; ++repeat) {
        const double begin = now_us();
        for (int i = 0; i < kRegions; ++i) {
#pragma omp parallel num_threads(threads)
            asm volatile("" : : : "memory");
        }
        samples.push_back((now_us() - begin) / kRegions);
    }
    return median(samples);
}

double matmul_gflops(bool bf16) {
#if defined(__x86_64__)
    float (*burn)(int64_t) = nullptr;
    double flops_per_step = 0;
    if (bf16 && build_info().cpu_isa == "amx") {
        burn = burn_amx;
        flops_per_step = kTileChains * 16 * 16 * 32 * 2.0;
    } else if (bf16 && __builtin_cpu_supports("avx512bf16")) {
        burn = burn_bf16;
        flops_per_step = kChains * 16 * 4.0;
    } else if (__builtin_cpu_supports("avx512f")) {
        burn = burn_f32_avx512;
        flops_per_step = kChains * 16 * 2.0;
    } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        burn = burn_f32_avx2;
        flops_per_step = kChains / 2 * 8 * 2.0;
    }
    if (burn == nullptr) return 0;
    const int threads = num_threads();
    double best_us = 1e30;
    for (int repeat = 0; repeat < 5; ++repeat) {
        float result = 0;
        const double begin = now_us();
#pragma omp parallel num_threads(threads) reduction(+ : result)
        result += burn(kSteps);
        const double us = now_us() - begin;
        keep(result);
        if (us < best_us) best_us = us;
    }
    return flops_per_step * static_cast<double>(kSteps) * threads / best_us / 1e3;
#else
    (void)bf16;
    return 0;
#endif
}

}  // namespace moecore::bench
