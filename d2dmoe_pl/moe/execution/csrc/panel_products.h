// Products of rows in uint8 with panels of weights in int8, as `in_panels` gives these.
#pragma once

#include "deep_tiles.h"
#include "few_tokens.h"
#include "int8_avx2.h"
#include "int8_products.h"
#include "packed.h"

#include <ATen/native/CPUBlas.h>

#include <vector>

namespace d2dmoe {

#if !defined(D2DMOE_INT8) || defined(D2DMOE_VNNI) // by tiles, or ATen's brgemm
class PanelProducts {
 public:
#if defined(D2DMOE_TILES)
  static constexpr int64_t kRows = 256, kColumns = 64; // at once
#else
  static constexpr int64_t kRows = 64, kColumns = kPanel;
#endif

  // Whether so many rows are rounded, and multiplied here.
  static bool are_there(int64_t) { return has_int8_brgemm(); }

  // How far rows of so many numbers are to lie apart.
  static int64_t apart(int64_t depth) {
#if defined(D2DMOE_TILES)
    return DeepTiles::apart(panel_depth(depth));
#else
    return panel_depth(depth);
#endif
  }

  // Rows `apart` from one another, behind which there is what kBehind and kLineBehind say.
  void take(const uint8_t* q, int64_t rows, int64_t apart, int64_t depth) {
    q_ = q, rows_ = rows, apart_ = apart, depth_ = panel_depth(depth);
  }

  // give(m, n, sums of columns n .. n + kWidth) of q (rows, depth) w, for the columns of one panel or several, at most
  // kColumns of them
  template <typename F>
  void multiply(const int8_t* panels, int64_t columns, const F& give) {
#if defined(D2DMOE_TILES)
    static_assert(kPanel == DeepTiles::kColumns);
    if (tiles_may_be_used()) {
      return tiles_.multiply<int32_t>(
          q_, apart_, rows_, panels, columns, depth_,
          [give](int64_t m, int64_t n, const int32_t* sums) { give(m, n, Whole::loadu(sums)); });
    }
#endif
    const int64_t height = rounded_height(rows_);
    c_.resize(height * kPanel);
    unit_.held = true;
    for (int64_t n = 0; n < columns; n += kPanel) {
      at::native::cpublas::brgemm(
          height, kPanel, depth_, apart_, kPanel, kPanel, /*add_C=*/false, q_, panels + n * depth_, c_.data());
      for (int64_t m = 0; m < rows_; ++m) {
        for (int64_t i = 0; i < kPanel; i += kWidth) give(m, n + i, Whole::loadu(c_.data() + m * kPanel + i));
      }
    }
  }

  void release() {
#if defined(D2DMOE_TILES)
    tiles_.release();
#endif
    unit_.release();
  }

 private:
#if defined(D2DMOE_TILES)
  DeepTiles tiles_;
#endif
  HeldUnit unit_;
  const uint8_t* q_;
  int64_t rows_, apart_, depth_;
  std::vector<int32_t> c_;
};
#else // by way of 16 bits
class PanelProducts {
 public:
  static constexpr int64_t kRows = 16 * kQuadRows, kColumns = kPanel; // at once

  static bool are_there(int64_t rows) { return rows > kFewTokens; }

  static int64_t apart(int64_t depth) { return panel_depth(depth); }

  void release() {} // holds nothing

  // rows are widened once for all panels
  void take(const uint8_t* q, int64_t rows, int64_t depth, int64_t) {
    rows_ = rows, depth_ = depth;
    wide_.resize(rows * depth);
    widen(q, rows * depth, wide_.data());
  }

  template <typename F>
  void multiply(const int8_t* panel, int64_t, const F& give) const {
    static_assert(kPanel == kQuadColumns && kPanel == kWidth);
    const auto put = [&](int64_t m, int64_t, int64_t, const __m256i& sums) { give(m, 0, Whole(sums)); };
    for_quad_sums(wide_.data(), rows_, depth_ / 4, panel, kPanel, kPanel, put);
  }

 private:
  int64_t rows_, depth_;
  std::vector<int16_t> wide_;
};
#endif

} // namespace d2dmoe
