// The second product of experts for many tokens, on the tiles of a matrix unit (AMX): 16 tokens by 64 columns at once,
// added to outputs straight away. ATen's brgemm takes longer for products as small as these.
#pragma once

#include "tile_unit.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>

namespace d2dmoe {

// Tiles set up for products of a depth of up to 32 groups, as long as this lives; ATen's brgemm is not to be called
// meanwhile. A group is four numbers in int8, or two in bf16; factors hold groups side by side, (groups, width). There may
// be no tiles on this machine.
class Tiles {
 public:
  static constexpr int64_t kRows = 16, kGroups = 16, kColumns = 64;

#if defined(D2DMOE_TILES)
  explicit Tiles(int64_t groups) : groups_(tiles_may_be_used() ? groups : 0) {
    if (groups_ == 0) return;
    TileShapes shapes;
    for (int tile = 0; tile < 4; ++tile) shapes.set(tile, kRows, 64); // sums
    shapes.set(4, kRows, first() * 4), shapes.set(5, first(), 64); // factors of the first kGroups
    if (rest() > 0) shapes.set(6, kRows, rest() * 4), shapes.set(7, rest(), 64); // of those behind
    shapes.set_up();
  }
  ~Tiles() {
    if (groups_ > 0) TileShapes::release();
  }
  Tiles(const Tiles&) = delete;

  // Whether products of this depth can be computed.
  bool fit(int64_t groups) const { return groups == groups_; }

  // As `int8_add_product`, of kColumns. Reads up to kRows - 1 rows of h behind the last, as `add_bfloat16` does.
  void add_int8(
      const uint8_t* h, int64_t ld, const float* h_scale, bool from_zero, const int8_t* w, int64_t width,
      const float* scale, const int32_t* less, float* y, int64_t y_ld, const int32_t* rows, int64_t count) const {
    __m512 scales[kVectors];
    __m512i off[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      scales[v] = _mm512_loadu_ps(scale + v * 16);
      off[v] = from_zero ? _mm512_setzero_si512() : _mm512_loadu_si512(less + v * 16);
    }
    add_rows<int32_t>(h, ld, w, width, rows, count, [=](const int32_t* sums, int64_t row, int64_t to) {
      const __m512 of_row = _mm512_set1_ps(h_scale[row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const __m512i whole = _mm512_sub_epi32(_mm512_load_si512(sums + v * 16), off[v]);
        const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), of_row);
        float* at = y + to * y_ld + v * 16;
        _mm512_storeu_ps(at, _mm512_fmadd_ps(part, scales[v], _mm512_loadu_ps(at)));
      }
    });
  }

  // y[rows] += h (count, 2 * groups) w, of kColumns
  void add_bfloat16(
      const at::BFloat16* h, int64_t ld, const at::BFloat16* w, int64_t width, float* y, int64_t y_ld,
      const int32_t* rows, int64_t count) const {
    add_rows<float>(h, ld * 2, w, width, rows, count, [=](const float* sums, int64_t, int64_t to) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* at = y + to * y_ld + v * 16;
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_load_ps(sums + v * 16), _mm512_loadu_ps(at)));
      }
    });
  }

 private:
  static constexpr int kVectors = kColumns / 16;

  int64_t first() const { return std::min(groups_, kGroups); }
  int64_t rest() const { return groups_ - first(); }

  // add(sums of a row, its number, its token) for each of `count` rows of h w; rows of h `stride` bytes apart
  template <typename Sum, typename F>
  [[gnu::always_inline]] void add_rows(
      const void* h, int64_t stride, const void* w, int64_t width, const int32_t* rows, int64_t count,
      const F& add) const {
    alignas(64) Sum sums[2][kRows * kColumns]; // one is added while the tiles fill the other
    const auto* first = static_cast<const char*>(h);
    multiply(first, stride, w, width * 4, sums[0]);
    for (int64_t m = 0; m < count; m += kRows) {
      const Sum* done = sums[m / kRows % 2];
      if (m + kRows < count) multiply(first + (m + kRows) * stride, stride, w, width * 4, sums[(m / kRows + 1) % 2]);
      for (int64_t i = m; i < std::min(m + kRows, count); ++i) add(done + (i - m) * kColumns, i, rows[i]);
    }
  }

  // sums (kRows, kColumns) = h w, of rows `h_stride` and `w_stride` bytes apart
  template <typename Sum>
  void multiply(const char* h, int64_t h_stride, const void* w, int64_t w_stride, Sum* sums) const {
    const auto* columns = static_cast<const char*>(w);
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    multiply_groups<4, 5, Sum>(h, h_stride, columns, w_stride);
    if (rest() > 0) multiply_groups<6, 7, Sum>(h + kGroups * 4, h_stride, columns + kGroups * w_stride, w_stride);
    constexpr int64_t kRow = kColumns * sizeof(Sum);
    store_tile<0>(sums, kRow), store_tile<1>(sums + 16, kRow), store_tile<2>(sums + 32, kRow), store_tile<3>(sums + 48, kRow);
  }

  template <int of_rows, int of_columns, typename Sum>
  static void multiply_groups(const char* h, int64_t h_stride, const char* w, int64_t w_stride) {
    constexpr int kBytes = 64; // of a tile's row
    load_tile<of_rows>(h, h_stride);
    load_tile<of_columns>(w, w_stride);
    multiply_tiles<0, of_rows, of_columns, Sum>();
    load_tile<of_columns>(w + kBytes, w_stride);
    multiply_tiles<1, of_rows, of_columns, Sum>();
    load_tile<of_columns>(w + 2 * kBytes, w_stride);
    multiply_tiles<2, of_rows, of_columns, Sum>();
    load_tile<of_columns>(w + 3 * kBytes, w_stride);
    multiply_tiles<3, of_rows, of_columns, Sum>();
  }

  const int64_t groups_; // 0 where there are no tiles
#else
  explicit Tiles(int64_t) {}
  bool fit(int64_t) const { return false; }
  template <typename... Any>
  void add_int8(const Any&...) const {}
  template <typename... Any>
  void add_bfloat16(const Any&...) const {}
#endif
};

} // namespace d2dmoe
