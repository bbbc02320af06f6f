// Rounding to int8 and back. What a token q in uint8 stands for is (q - 128) * scale, so that 128 times the sum of the
// weights that it is multiplied with is taken off again.
#pragma once

#include "activations.h"
#include "products.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__)
#define D2DMOE_VNNI
#define D2DMOE_INT8 // there are products of tokens in uint8 with weights in int8
#include <immintrin.h>
#elif defined(CPU_CAPABILITY_AVX2) && defined(__AVX2__)
#define D2DMOE_INT8
#include <immintrin.h>
#endif

namespace d2dmoe {

constexpr int64_t kZeroPoint = 128;

// Values in floats: where they are, or in `buffer`.
template <typename T>
const float* in_floats(const T* values, float* buffer, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    return values;
  } else {
    at::vec::convert(values, buffer, count);
    return buffer;
  }
}

// The largest of values but for their signs; NaN where one is.
inline float largest_magnitude(const float* values, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  // as integers, of which NaNs are the largest: `maximum` takes three times as long to look out for these
  const auto bits = [](const float* from, __mmask16 there) {
    return _mm512_and_si512(_mm512_maskz_loadu_epi32(there, from), _mm512_set1_epi32(0x7fffffff));
  };
  __m512i most[4] = {};
  int64_t k = 0;
  for (; k + 64 <= count; k += 64) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) most[i] = _mm512_max_epi32(most[i], bits(values + k + i * 16, 0xffff));
  }
  for (; k < count; k += 16) {
    const __mmask16 there = count - k >= 16 ? 0xffff : (1u << (count - k)) - 1;
    most[0] = _mm512_max_epi32(most[0], bits(values + k, there));
  }
  const __m512i all = _mm512_max_epi32(_mm512_max_epi32(most[0], most[1]), _mm512_max_epi32(most[2], most[3]));
  return std::bit_cast<float>(_mm512_reduce_max_epi32(all));
#else
  Vec largest(0.f);
  for (int64_t k = 0; k < count; k += kWidth) {
    const Vec v = Vec::loadu(values + k, std::min(kWidth, count - k));
    largest = at::vec::maximum(largest, v.abs());
  }
  return largest_lane(largest);
#endif
}

// q (count,) in uint8 of values, which q - zero_point times the returned scale stands for. A NaN makes the scale NaN.
inline float quantise(const float* values, int64_t count, bool from_zero, uint8_t* q) {
  const float most = largest_magnitude(values, count);
  const float steps = from_zero ? 255.f : 127.f;
  const float scale = most == 0.f ? 1.f : most / steps, inverse = 1.f / scale;
  const float offset = from_zero ? 0.f : static_cast<float>(kZeroPoint);
  int64_t k = 0;
#if defined(D2DMOE_INT8) && !defined(D2DMOE_VNNI)
  const __m256 times = _mm256_set1_ps(inverse), plus = _mm256_set1_ps(offset);
  const auto whole = [&](int64_t at) {
    return _mm256_cvtps_epi32(_mm256_fmadd_ps(_mm256_loadu_ps(values + at), times, plus));
  };
  for (; k + 16 <= count; k += 16) {
    // packs go by halves of 128 bits
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole(k), whole(k + 8)), 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), bytes);
  }
#endif
#if defined(D2DMOE_VNNI)
  for (; k + 16 <= count; k += 16) {
    const __m512 v = _mm512_fmadd_ps(_mm512_loadu_ps(values + k), _mm512_set1_ps(inverse), _mm512_set1_ps(offset));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(v)));
  }
#endif
  for (; k < count; ++k) {
    const float rounded = std::nearbyint(values[k] * inverse + offset);
    q[k] = rounded >= 0.f ? static_cast<uint8_t>(std::min(rounded, 255.f)) : 0;
  }
  return scale;
}

using Whole = at::vec::Vectorized<int32_t>;

// (sums - less) * scale * of_row, of `count` columns
inline Vec dequantised(Whole sums, const int32_t* less, const float* scale, float of_row, int64_t count = kWidth) {
  return at::vec::convert<float>(sums - Whole::loadu(less, count)) * (Vec(of_row) * Vec::loadu(scale, count));
}

inline void store_as(Vec values, float* to, int64_t count = kWidth) {
  values.store(to, count);
}

inline void store_as(Vec values, at::BFloat16* to, int64_t count = kWidth) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  const __mmask16 there = count >= 16 ? 0xffff : (1u << count) - 1;
  _mm256_mask_storeu_epi16(to, there, std::bit_cast<__m256i>(_mm512_cvtneps_pbh(values)));
#else
  at::vec::convert_from_float<at::BFloat16>(values, values).store(to, count);
#endif
}

// to += (from - less) * scale * of_row, each (count,); less may be null
inline void dequantise_add(
    const int32_t* from, const int32_t* less, const float* scale, float of_row, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Whole whole = less == nullptr ? Whole::loadu(from + i) : Whole::loadu(from + i) - Whole::loadu(less + i);
    const Vec scales = Vec(of_row) * Vec::loadu(scale + i);
    at::vec::fmadd(at::vec::convert<float>(whole), scales, Vec::loadu(to + i)).store(to + i);
  }
  for (; i < count; ++i) to[i] += static_cast<float>(from[i] - (less == nullptr ? 0 : less[i])) * scale[i] * of_row;
}

// Weights (neurons, width), a scale and 128 times the sum of each row.
struct Int8Rows {
  const int8_t* weight;
  const float* scale;
  const int32_t* sum;
};

} // namespace d2dmoe
