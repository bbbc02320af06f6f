// Products of tokens in uint8 with weights in int8, by VNNI (vpdpbusd).
#pragma once

#include "int8_products.h"

#if defined(D2DMOE_VNNI)

namespace d2dmoe {

// Adds products of fours, in the register that the sum is in: as an intrinsic, GCC keeps sums of a loop in memory.
inline void dot_add(__m512i& sum, __m512i of_uint8, __m512i of_int8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(of_uint8), "v"(of_int8));
}

// Sums over the lanes of four vectors, to four neighbouring numbers.
inline __m128i lane_sums(const __m512i (&v)[4]) {
  __m256i half[4];
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm256_add_epi32(_mm512_castsi512_si256(v[i]), _mm512_extracti64x4_epi64(v[i], 1));
  }
  const __m256i sums =
      _mm256_hadd_epi32(_mm256_hadd_epi32(half[0], half[1]), _mm256_hadd_epi32(half[2], half[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

constexpr int kInt8DotRows = kDotRows; // of a tile, by kNeurons

template <int M>
void int8_dot_tile(
    const uint8_t* x, int64_t width, const float* x_scale, const int32_t* rows, const Int8Rows& w, int neurons,
    float* out, int64_t ld) {
  const uint8_t* a[M];
  const int8_t* b[kNeurons];
  for (int m = 0; m < M; ++m) a[m] = x + rows[m] * width;
  for (int n = 0; n < kNeurons; ++n) b[n] = w.weight + std::min(n, neurons - 1) * width;
  __m512i sum[M][kNeurons];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kNeurons; ++n) sum[m][n] = _mm512_setzero_si512();
  for (int64_t k = 0; k < width; k += 64) {
    const __mmask64 there = width - k >= 64 ? ~0ull : (1ull << (width - k)) - 1;
    __m512i xv[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) xv[m] = _mm512_maskz_loadu_epi8(there, a[m] + k);
#pragma GCC unroll 8
    for (int n = 0; n < kNeurons; ++n) {
      const __m512i wv = _mm512_maskz_loadu_epi8(there, b[n] + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) dot_add(sum[m][n], xv[m], wv);
    }
  }
  const __mmask8 stored = (1u << neurons) - 1;
  const __m128i less = _mm_maskz_loadu_epi32(stored, w.sum);
  const __m128 scale = _mm_maskz_loadu_ps(stored, w.scale);
  for (int m = 0; m < M; ++m) {
    const __m128 whole = _mm_cvtepi32_ps(_mm_sub_epi32(lane_sums(sum[m]), less));
    _mm_mask_storeu_ps(out + m * ld, stored, _mm_mul_ps(whole, _mm_mul_ps(scale, _mm_set1_ps(x_scale[rows[m]]))));
  }
}

// y[rows[m]][n] += (sum_k h[m][k] * w[k][n] - off * sum[n]) * h_scale[m] * scale[n], for M rows and V vectors of columns;
// where these are not whole, of those that are `there`. Masks are not for nothing, even if they leave nothing out.
template <int M, int V, bool kWhole>
void int8_add_tile(
    const uint8_t* h, int64_t ld, int64_t quads, const float* h_scale, bool from_zero, const int8_t* w, int64_t width,
    const float* scale, const int32_t* less, float* y, int64_t y_ld, const int32_t* rows, __mmask16 there) {
  const auto whole = [&](const void* from) {
    return kWhole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi32(there, from);
  };
  const auto real = [&](const float* from) {
    return kWhole ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(there, from);
  };
  __m512i sum[M][V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const __m512i none = _mm512_setzero_si512(), start = from_zero ? none : _mm512_sub_epi32(none, whole(less + v * 16));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[m][v] = start;
  }
  for (int64_t k = 0; k < quads; ++k) {
    __m512i wv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) wv[v] = whole(w + (k * width + v * 16) * 4);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m512i hv = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(h + m * ld + k * 4));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) dot_add(sum[m][v], hv, wv[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const __m512 s = real(scale + v * 16);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      float* at = y + rows[m] * y_ld + v * 16;
      const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[m][v]), _mm512_set1_ps(h_scale[m]));
      const __m512 sums = _mm512_fmadd_ps(part, s, real(at));
      if constexpr (kWhole) {
        _mm512_storeu_ps(at, sums);
      } else {
        _mm512_mask_storeu_ps(at, there, sums);
      }
    }
  }
}

// y[rows] += h (count, 4 * quads) w, of which four rows each are interleaved: (quads, width, 4), of which `columns`
inline void int8_add_product(
    const uint8_t* h, int64_t ld, int64_t quads, const float* h_scale, bool from_zero, const int8_t* w, int64_t width,
    int64_t columns, const float* scale, const int32_t* less, float* y, int64_t y_ld, const int32_t* rows,
    int64_t count) {
  constexpr int kRows = 6, kVectorsHere = 4;
  for (int64_t m = 0; m < count; m += kRows) {
    with_rows<kRows>(std::min<int64_t>(kRows, count - m), [&](auto M) {
      int64_t n = 0;
      for (; n + kVectorsHere * 16 <= columns; n += kVectorsHere * 16) {
        int8_add_tile<M, kVectorsHere, true>(
            h + m * ld, ld, quads, h_scale + m, from_zero, w + n * 4, width, scale + n, less + n, y + n, y_ld, rows + m,
            0xffff);
      }
      for (; n < columns; n += 16) {
        const __mmask16 there = columns - n >= 16 ? 0xffff : (1u << (columns - n)) - 1;
        int8_add_tile<M, 1, false>(
            h + m * ld, ld, quads, h_scale + m, from_zero, w + n * 4, width, scale + n, less + n, y + n, y_ld, rows + m,
            there);
      }
    });
  }
}

} // namespace d2dmoe

#endif
