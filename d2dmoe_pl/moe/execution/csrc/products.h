// The two small products of an expert, on rows picked by index: nothing is gathered into a copy first.
#pragma once

#include "activations.h"

#include <algorithm>
#include <cstdint>
#include <utility>

namespace d2dmoe {

// Tiles: tokens times neurons, and tokens times vectors of output columns. Their sums fill the 32 registers of AVX-512,
// or the 16 of AVX2, but for what is multiplied.
constexpr int kNeurons = 4; // of which one reduction makes one store
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kDotRows = 6, kAddRows = 6, kVectors = 4;
#else
constexpr int kDotRows = 3, kAddRows = 6, kVectors = 2;
#endif

// Keeps a value in a register, where the compiler would rather read it from memory once a use.
inline void keep(Vec& v) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 x = v;
  asm("" : "+v"(x));
  v = x;
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 x = v;
  asm("" : "+x"(x));
  v = x;
#endif
}

// Sums over the lanes of four vectors, to four neighbouring floats.
inline void store_sums(const Vec (&v)[4], float* out) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512 x = v[i];
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
    half[i] = v[i];
#endif
  }
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  for (int i = 0; i < 4; ++i) {
    out[i] = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, v[i]);
  }
#endif
}

// out[m][n] = sum_k x[rows[m]][k] * w[n][k] for M rows of x and 4 of w, of which only the first `neurons` are there.
template <int M>
void dot_tile(const float* x, int64_t width, const int32_t* rows, const float* w, int neurons, float* out, int64_t ld) {
  const float* a[M];
  const float* b[kNeurons];
  for (int m = 0; m < M; ++m) a[m] = x + rows[m] * width;
  for (int n = 0; n < kNeurons; ++n) b[n] = w + std::min(n, neurons - 1) * width;
  Vec sum[M][kNeurons];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kNeurons; ++n) sum[m][n] = Vec(0.f);
  int64_t k = 0;
  for (; k + kWidth <= width; k += kWidth) {
    Vec xv[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) keep(xv[m] = Vec::loadu(a[m] + k));
#pragma GCC unroll 8
    for (int n = 0; n < kNeurons; ++n) {
      Vec wv = Vec::loadu(b[n] + k);
      keep(wv);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[m][n] = at::vec::fmadd(xv[m], wv, sum[m][n]);
    }
  }
  if (k < width) {
    const int64_t rest = width - k;
    for (int m = 0; m < M; ++m) {
      const Vec xv = Vec::loadu(a[m] + k, rest);
      for (int n = 0; n < kNeurons; ++n) sum[m][n] = at::vec::fmadd(xv, Vec::loadu(b[n] + k, rest), sum[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    if (neurons == kNeurons) {
      store_sums(sum[m], out + m * ld);
    } else {
      float four[kNeurons];
      store_sums(sum[m], four);
      std::copy(four, four + neurons, out + m * ld);
    }
  }
}

// y[rows[m]][n] += sum_k h[m][k] * w[k][n] for M rows and V vectors of columns; with V = 1 only the first `columns`.
template <int M, int V>
void add_tile(
    const float* h, int64_t ld, int64_t depth, const float* w, int64_t width, float* y, const int32_t* rows,
    int64_t columns = kWidth) {
  Vec sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const float* at = y + rows[m] * width + v * kWidth;
      sum[m][v] = V == 1 ? Vec::loadu(at, columns) : Vec::loadu(at);
    }
  for (int64_t k = 0; k < depth; ++k) {
    Vec wv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const float* at = w + k * width + v * kWidth;
      wv[v] = V == 1 ? Vec::loadu(at, columns) : Vec::loadu(at);
    }
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) keep(wv[v]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec hv(h[m * ld + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[m][v] = at::vec::fmadd(hv, wv[v], sum[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* at = y + rows[m] * width + v * kWidth;
      if (V == 1) sum[m][v].store(at, columns); else sum[m][v].store(at);
    }
}

// Call f with std::integral_constant<int, rows>, 1 <= rows <= M.
template <int M, typename F>
void with_rows(int64_t rows, const F& f) {
  if constexpr (M > 1) {
    if (rows < M) return with_rows<M - 1>(rows, f);
  }
  f(std::integral_constant<int, M>());
}

// h (count, neurons) = x[rows] w^T
inline void dot_product(
    const float* x, int64_t width, const int32_t* rows, int64_t count, const float* w, int64_t neurons, float* h,
    int64_t ld) {
  for (int64_t m = 0; m < count; m += kDotRows) {
    with_rows<kDotRows>(std::min<int64_t>(kDotRows, count - m), [&](auto M) {
      for (int64_t n = 0; n < neurons; n += kNeurons) {
        dot_tile<M>(x, width, rows + m, w + n * width, std::min<int64_t>(kNeurons, neurons - n), h + m * ld + n, ld);
      }
    });
  }
}

// y[rows] += h (count, depth) w (depth, width)
inline void add_product(
    const float* h, int64_t ld, int64_t depth, const float* w, int64_t width, float* y, const int32_t* rows,
    int64_t count) {
  const int64_t step = count <= 2 ? 8 : depth; // for few tokens, weights are read once: few rows side by side
  for (int64_t m = 0; m < count; m += kAddRows) {
    with_rows<kAddRows>(std::min<int64_t>(kAddRows, count - m), [&](auto M) {
      for (int64_t k = 0; k < depth; k += step) {
        const int64_t ks = std::min(step, depth - k);
        int64_t n = 0;
        for (; n + kVectors * kWidth <= width; n += kVectors * kWidth) {
          add_tile<M, kVectors>(h + m * ld + k, ld, ks, w + k * width + n, width, y + n, rows + m);
        }
        for (; n < width; n += kWidth) {
          const int64_t columns = std::min(kWidth, width - n);
          add_tile<M, 1>(h + m * ld + k, ld, ks, w + k * width + n, width, y + n, rows + m, columns);
        }
      }
    });
  }
}

} // namespace d2dmoe
