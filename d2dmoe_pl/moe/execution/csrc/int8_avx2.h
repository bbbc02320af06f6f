// Products of tokens in uint8 with weights in int8, of numbers widened to 16 bits (vpmaddwd): exact, and twice as many an
// instruction as of floats.
#pragma once

#include "few_tokens.h"
#include "int8_products.h"
#include "packed.h"

#if defined(D2DMOE_INT8) && !defined(D2DMOE_VNNI)

#include <vector>

namespace d2dmoe {

inline __m256i widened(const uint8_t* sixteen) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
}

inline __m256i widened(const int8_t* sixteen) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
}

inline void widen(const uint8_t* values, int64_t count, int16_t* to) {
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), widened(values + k));
  for (; k < count; ++k) to[k] = values[k];
}

// Adds products of pairs, in the register that the sum is in: as intrinsics, GCC keeps sums of a loop in memory.
inline void dot_add(__m256i& sum, __m256i a, __m256i b) {
  __m256i products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "x"(b));
}

// The same of four numbers, repeated, with sixteen each.
inline void dot_add_both(__m256i& low, __m256i& high, const int16_t* four, __m256i first, __m256i second) {
  __m256i a, products;
  asm("vpbroadcastq %4, %2\n\t"
      "vpmaddwd %5, %2, %3\n\tvpaddd %3, %0, %0\n\t"
      "vpmaddwd %6, %2, %2\n\tvpaddd %2, %1, %1"
      : "+x"(low), "+x"(high), "=&x"(a), "=&x"(products)
      : "m"(*reinterpret_cast<const int16_t(*)[4]>(four)), "x"(first), "x"(second));
}

// Sums over the lanes of four vectors, to four neighbouring numbers.
inline __m128i lane_sums(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i sums = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

constexpr int kInt8DotRows = 2; // of a tile, by kNeurons

template <int M>
void int8_dot_tile(
    const uint8_t* x, int64_t width, const float* x_scale, const int32_t* rows, const Int8Rows& w, int neurons,
    float* out, int64_t ld) {
  const uint8_t* a[M];
  const int8_t* b[kNeurons];
  for (int m = 0; m < M; ++m) a[m] = x + rows[m] * width;
  for (int n = 0; n < kNeurons; ++n) b[n] = w.weight + std::min(n, neurons - 1) * width;
  __m256i sum[M][kNeurons];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kNeurons; ++n) sum[m][n] = _mm256_setzero_si256();
  uint8_t last_x[M][16] = {};
  int8_t last_w[kNeurons][16] = {};
  for (int64_t k = 0; k < width; k += 16) {
    if (width - k < 16) { // go on in copies with zeros behind
      for (int m = 0; m < M; ++m) a[m] = std::copy_n(a[m] + k, width - k, last_x[m]) - width;
      for (int n = 0; n < kNeurons; ++n) b[n] = std::copy_n(b[n] + k, width - k, last_w[n]) - width;
    }
    __m256i xv[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) xv[m] = widened(a[m] + k);
#pragma GCC unroll 8
    for (int n = 0; n < kNeurons; ++n) {
      const __m256i wv = widened(b[n] + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) dot_add(sum[m][n], xv[m], wv);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    static_assert(kNeurons == 4);
    alignas(16) int32_t four[kNeurons];
    const __m128i sums = lane_sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
    _mm_store_si128(reinterpret_cast<__m128i*>(four), sums);
    const float scale = x_scale[rows[m]];
    for (int n = 0; n < neurons; ++n) out[m * ld + n] = static_cast<float>(four[n] - w.sum[n]) * (w.scale[n] * scale);
  }
}

constexpr int kQuadRows = 6, kQuadColumns = 8; // of a tile, whose sums fill the registers

// sum[m][n] = sum_k h[m][k] w[k][n] for M rows, of w (quads, width, 4), of which `columns` are there.
template <int M, bool kIsWhole>
void quad_sums(
    const int16_t* h, int64_t ld, int64_t quads, const int8_t* w, int64_t width, int64_t columns, __m256i (&sum)[M]) {
  __m256i low[M], high[M]; // two sums a column
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) low[m] = high[m] = _mm256_setzero_si256();
  for (int64_t k = 0; k < quads; ++k) {
    const int8_t* from = w + k * width * 4;
    int8_t own[kQuadColumns * 4] = {};
    if constexpr (!kIsWhole) from = std::copy_n(from, columns * 4, own) - columns * 4;
    const __m256i first = widened(from), second = widened(from + 16);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) dot_add_both(low[m], high[m], h + m * ld + k * 4, first, second);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sum[m] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[m], high[m]), 0xD8);
}

// Call f(m, n, columns, sums) for each row and kQuadColumns of the products of h (count, 4 * quads) with w.
template <typename F>
void for_quad_sums(
    const int16_t* h, int64_t count, int64_t quads, const int8_t* w, int64_t width, int64_t columns, const F& f) {
  const int64_t depth = quads * 4;
  for (int64_t first = 0; first < count; first += kQuadRows) {
    with_rows<kQuadRows>(std::min<int64_t>(kQuadRows, count - first), [&](auto M) {
      for (int64_t n = 0; n < columns; n += kQuadColumns) {
        const int64_t here = std::min<int64_t>(kQuadColumns, columns - n);
        __m256i sums[M];
        if (here == kQuadColumns) {
          quad_sums<M, true>(h + first * depth, depth, quads, w + n * 4, width, here, sums);
        } else {
          quad_sums<M, false>(h + first * depth, depth, quads, w + n * 4, width, here, sums);
        }
        for (int64_t m = 0; m < M; ++m) f(first + m, n, here, sums[m]);
      }
    });
  }
}

// Rows (count, depth) in 16 bits, until the next call of this thread.
inline const int16_t* widened_rows(const uint8_t* rows, int64_t ld, int64_t count, int64_t depth) {
  thread_local std::vector<int16_t> wide;
  if (static_cast<int64_t>(wide.size()) < count * depth) wide.resize(count * depth);
  for (int64_t m = 0; m < count; ++m) widen(rows + m * ld, depth, wide.data() + m * depth);
  return wide.data();
}

// c (count, columns) = x (count, 4 * quads) w, of the same w
inline void quad_product(
    const uint8_t* x, int64_t count, int64_t quads, const int8_t* w, int64_t width, int64_t columns, int32_t* c) {
  const auto put = [&](int64_t m, int64_t n, int64_t here, const __m256i& sums) {
    alignas(32) int32_t whole[kQuadColumns];
    _mm256_store_si256(reinterpret_cast<__m256i*>(whole), sums);
    std::copy_n(whole, here, c + m * columns + n);
  };
  for_quad_sums(widened_rows(x, quads * 4, count, quads * 4), count, quads, w, width, columns, put);
}

// y[rows] += h (count, 4 * quads) w, of which four rows each are interleaved: (quads, width, 4), of which `columns`
inline void int8_add_product(
    const uint8_t* h, int64_t ld, int64_t quads, const float* h_scale, bool from_zero, const int8_t* w, int64_t width,
    int64_t columns, const float* scale, const int32_t* less, float* y, int64_t y_ld, const int32_t* rows,
    int64_t count) {
  const int16_t* wide = widened_rows(h, ld, count, quads * 4);
  const auto add = [&](int64_t m, int64_t n, int64_t here, const __m256i& sums) {
    float* to = y + rows[m] * y_ld + n;
    if (here == kQuadColumns) {
      const auto* off = reinterpret_cast<const __m256i*>(less + n);
      const __m256i whole = from_zero ? sums : _mm256_sub_epi32(sums, _mm256_loadu_si256(off));
      const __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(h_scale[m]));
      _mm256_storeu_ps(to, _mm256_fmadd_ps(part, _mm256_loadu_ps(scale + n), _mm256_loadu_ps(to)));
    } else {
      alignas(32) int32_t whole[kQuadColumns];
      _mm256_store_si256(reinterpret_cast<__m256i*>(whole), sums);
      dequantise_add(whole, from_zero ? nullptr : less + n, scale + n, h_scale[m], here, to);
    }
  };
  for_quad_sums(wide, count, quads, w, width, columns, add);
}

} // namespace d2dmoe

#endif
