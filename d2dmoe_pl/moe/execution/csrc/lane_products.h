// Products of integers by VNNI, of which a lane of 32 bits holds two words or four bytes; their sums fit its 32 bits.
#pragma once

#include "int8_vnni.h"
#include "products.h"

#if defined(D2DMOE_VNNI)

namespace d2dmoe {

struct OfBytes { // unsigned ones with signed ones
  static void add(__m512i& sum, __m512i a, __m512i b) { dot_add(sum, a, b); }
};

struct OfWords {
  // in the register that the sum is in, as in dot_add
  static void add(__m512i& sum, __m512i a, __m512i b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
};

template <typename Products, int M, int V, typename F>
void lane_tile(const int32_t* const (&a)[M], int64_t depth, const int32_t* b, int64_t width, const F& give) {
  __m512i sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[m][v] = _mm512_setzero_si512();
  for (int64_t k = 0; k < depth; ++k) {
    __m512i bv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) bv[v] = _mm512_loadu_si512(b + k * width + v * kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m512i av = _mm512_set1_epi32(a[m][k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) Products::add(sum[m][v], av, bv[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) give(m, v * kWidth, Vec(_mm512_cvtepi32_ps(sum[m][v])));
}

// give(m, n, (a b)[m][n .. n + kWidth]) of lanes a, whose row m begins at row(m), and b (depth, columns), `width` apart;
// `columns` is a multiple of kWidth.
template <typename Products, typename Row, typename F>
void lane_product(
    const Row& row, int64_t rows, int64_t depth, const int32_t* b, int64_t width, int64_t columns, const F& give) {
  for (int64_t n = 0; n < columns; n += kVectors * kWidth) {
    with_rows<kVectors>(std::min<int64_t>(kVectors, (columns - n) / kWidth), [&](auto V) {
      for (int64_t first = 0; first < rows; first += kAddRows) {
        with_rows<kAddRows>(std::min<int64_t>(kAddRows, rows - first), [&](auto M) {
          const int32_t* a[M];
          for (int m = 0; m < M; ++m) a[m] = row(first + m);
          lane_tile<Products, M, V>(a, depth, b + n, width, [&](int64_t m, int64_t column, Vec sums) {
            give(first + m, n + column, sums);
          });
        });
      }
    });
  }
}

} // namespace d2dmoe

#endif
