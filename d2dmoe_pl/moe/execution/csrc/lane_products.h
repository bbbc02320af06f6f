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

// Rows that lie one after the other, four to a pointer, since there are not as many registers as rows; in assembly, since
// GCC would have one for each.
template <int M>
class InOrder {
 public:
  static constexpr int kTogether = M < 4 ? M : 4;

  InOrder(const int32_t* first, int64_t apart) : bytes_(apart * sizeof(int32_t)), three_(3 * bytes_) {
    for (int g = 0; g < M / kTogether; ++g) at_[g] = first + g * kTogether * apart;
  }

  void load(int g, __m512i (&x)[kTogether]) const {
    const auto& read = *reinterpret_cast<const int32_t(*)[]>(at_[g]);
    asm("vpbroadcastd (%1), %0" : "=v"(x[0]) : "r"(at_[g]), "m"(read));
    if constexpr (kTogether > 1) asm("vpbroadcastd (%1,%2), %0" : "=v"(x[1]) : "r"(at_[g]), "r"(bytes_), "m"(read));
    if constexpr (kTogether > 2) asm("vpbroadcastd (%1,%2,2), %0" : "=v"(x[2]) : "r"(at_[g]), "r"(bytes_), "m"(read));
    if constexpr (kTogether > 3) asm("vpbroadcastd (%1,%2), %0" : "=v"(x[3]) : "r"(at_[g]), "r"(three_), "m"(read));
  }

  void step() {
#pragma GCC unroll 4
    for (int g = 0; g < M / kTogether; ++g) ++at_[g];
  }

 private:
  const int32_t* at_[M / kTogether];
  int64_t bytes_, three_;
};

// Rows that lie anywhere.
template <int M>
class Picked {
 public:
  static constexpr int kTogether = 1;

  Picked(const int32_t* from, int64_t apart, const int32_t* rows) {
    for (int m = 0; m < M; ++m) at_[m] = from + rows[m] * apart;
  }

  void load(int m, __m512i (&x)[1]) const { asm("vpbroadcastd %1, %0" : "=v"(x[0]) : "m"(at_[m][k_])); }

  void step() { ++k_; }

 private:
  const int32_t* at_[M];
  int64_t k_ = 0;
};

template <typename Products, int M, int V, typename Rows, typename F>
void lane_tile(Rows rows, int64_t depth, const int32_t* b, int64_t width, const F& give) {
  constexpr int kTogether = Rows::kTogether;
  __m512i sum[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[m][v] = _mm512_setzero_si512();
  for (int64_t k = 0; k < depth; ++k, rows.step()) {
    __m512i bv[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) bv[v] = _mm512_loadu_si512(b + k * width + v * kWidth);
#pragma GCC unroll 16
    for (int g = 0; g < M / kTogether; ++g) {
      __m512i av[kTogether];
      rows.load(g, av);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
        for (int m = 0; m < kTogether; ++m) Products::add(sum[g * kTogether + m][v], av[m], bv[v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) give(m, v * kWidth, Whole(sum[m][v]));
}

// Call f with std::integral_constant<int, size> and the first of so many, until all of `count` have been: parts of M, and
// what is left in smaller ones.
template <int M, int... Fewer, typename F>
void in_parts(int64_t count, const F& f, int64_t first = 0) {
  for (; count - first >= M; first += M) f(std::integral_constant<int, M>(), first);
  if constexpr (sizeof...(Fewer) > 0) in_parts<Fewer...>(count, f, first);
}

// Call f with std::integral_constant<int, vectors> and their first column, for `columns`.
template <typename F>
void by_vectors(int64_t columns, const F& f) {
  in_parts<2, 1>((columns + kWidth - 1) / kWidth, [&](auto V, int64_t first) { f(V, first * kWidth); });
}

// give(m, n, (a b)[m][n .. n + kWidth]) of lanes a (rows, depth), `apart` from one another, and b (depth, columns), whose
// rows are `width` apart. Where `columns` are no multiple of kWidth, vectors of b are read, and sums given, as if they were.
template <typename Products, typename F>
void lane_product(
    const int32_t* a, int64_t apart, int64_t rows, int64_t depth, const int32_t* b, int64_t width, int64_t columns,
    const F& give) {
  by_vectors(columns, [&](auto V, int64_t n) {
    in_parts<12, 8, 4, 2, 1>(rows, [&](auto M, int64_t first) {
      lane_tile<Products, M, V>(
          InOrder<M>(a + first * apart, apart), depth, b + n, width,
          [&](int64_t m, int64_t column, Whole sums) { give(first + m, n + column, sums); });
    });
  });
}

// The same of rows of `a` that are picked: give(m, ...) of row rows[m].
template <typename Products, typename F>
void picked_lane_product(
    const int32_t* a, int64_t apart, const int32_t* rows, int64_t count, int64_t depth, const int32_t* b, int64_t width,
    int64_t columns, const F& give) {
  by_vectors(columns, [&](auto V, int64_t n) {
    in_parts<6, 4, 2, 1>(count, [&](auto M, int64_t first) {
      lane_tile<Products, M, V>(
          Picked<M>(a, apart, rows + first), depth, b + n, width,
          [&](int64_t m, int64_t column, Whole sums) { give(first + m, n + column, sums); });
    });
  });
}

} // namespace d2dmoe

#endif
