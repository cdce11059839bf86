#pragma once

// Constants of exp and log, shared by every device: the kernels of each device run the same
// sequence of float32 operations on them (fma where written, one rounding each), so scores, and
// with them the choice of experts, have the same bits everywhere.

namespace moecore::score {

// exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln(2) / 2. Source: Cephes expf, error < 1 ulp.
inline constexpr float kExpOverflow = 88.8f;     ///< above: +inf
inline constexpr float kExpUnderflow = -104.0f;  ///< below: 0
inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr float kRoundMagic = 12582912.0f;  ///< 1.5 * 2^23: adding it rounds to an integer
inline constexpr int kRoundMagicBits = 0x4b400000;
inline constexpr float kLn2High = 0.693359375f;
inline constexpr float kLn2Low = -2.12194440e-4f;
inline constexpr float kExpPoly[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                      4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

// 2^x = 2^n * (1 + f * poly(f)), n = round(x), |f| <= 1/2: minimax in relative error, 4e-9.
inline constexpr float kExp2Poly[6] = {1.546973197e-4f, 1.341000097e-3f, 9.618030783e-3f,
                                       5.550297314e-2f, 2.402265108e-1f, 6.931472254e-1f};

// log(u) = e * ln 2 + log(1 + f), 1 + f in [sqrt(1/2), sqrt(2)). Source: Cephes logf.
inline constexpr int kSqrtHalfBits = 0x3f3504f3;
inline constexpr float kLogPoly[9] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                      -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                      2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};

/// Above this, log(1 + exp(x)) is x in float32.
inline constexpr float kSoftplusLinear = 20.0f;

}  // namespace moecore::score
