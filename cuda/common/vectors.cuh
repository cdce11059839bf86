#pragma once

// Neighbouring elements that move at once, and whether they can.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/math.cuh"
#include "moecore/dtype.hpp"

namespace moecore::cuda {

inline constexpr int kVectorBytes = 16;

/// The largest word that moves kBytes in whole ones.
template <int kBytes>
using WordOf =
    std::conditional_t<kBytes % 16 == 0, uint4,
                       std::conditional_t<kBytes % 8 == 0, uint2,
                                          std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>>>;

/// kCount neighbouring elements as they lie in memory. Whole words, because nvcc takes elements of
/// 16 bits apart where they arrive, and so waits for one load before it issues the next.
template <typename T, int kCount>
struct Vector {
    using Word = WordOf<sizeof(T) * kCount>;
    static constexpr int kWords = sizeof(T) * kCount / sizeof(Word);

    Word words[kWords];

    static __device__ Vector load(const T* elements) {
        Vector vector;
#pragma unroll
        for (int i = 0; i < kWords; ++i)
            vector.words[i] = reinterpret_cast<const Word*>(elements)[i];
        return vector;
    }
    /// Rounds as from_float does: bfloat16 in pairs by the instruction for it, unless there is a
    /// NaN, of which it would keep nothing.
    static __device__ Vector from_floats(const float (&values)[kCount]) {
        T elements[kCount];
        if constexpr (std::is_same_v<T, __nv_bfloat16> && kCount % 2 == 0) {
            bool has_nan = false;
#pragma unroll
            for (int i = 0; i < kCount; i += 2) {
                const __nv_bfloat162 pair = __floats2bfloat162_rn(values[i], values[i + 1]);
                elements[i] = pair.x;
                elements[i + 1] = pair.y;
                has_nan |= !(values[i] <= values[i + 1] || values[i] > values[i + 1]);
            }
            Vector vector;
            memcpy(vector.words, elements, sizeof elements);
            if (!has_nan) [[likely]]
                return vector;
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) elements[i] = from_float<T>(values[i]);
        Vector vector;
        memcpy(vector.words, elements, sizeof elements);
        return vector;
    }
    __device__ void store(T* elements) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(elements)[i] = words[i];
    }
    __device__ void to_floats(float (&values)[kCount]) const {
        T elements[kCount];
        memcpy(elements, words, sizeof elements);
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] = to_float(elements[i]);
    }
};

/// Whether rows of `stride` elements that begin at `data` can be moved in vectors of 16 bytes.
inline bool are_rows_aligned(const void* data, int64_t stride, DType dtype) {
    return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
           static_cast<size_t>(stride) * size_of(dtype) % kVectorBytes == 0;
}

}  // namespace moecore::cuda
