// Products of rows in uint8 with panels of weights in int8, as `in_panels` gives these.
#pragma once

#include "few_tokens.h"
#include "int8_avx2.h"
#include "int8_products.h"
#include "packed.h"

#include <ATen/native/CPUBlas.h>

#include <vector>

namespace d2dmoe {

#if !defined(D2DMOE_INT8) || defined(D2DMOE_VNNI) // by ATen's brgemm
class PanelProducts {
 public:
  static constexpr int64_t kRows = 64; // at once

  // Whether so many rows are rounded, and multiplied here.
  static bool are_there(int64_t) { return has_int8_brgemm(); }

  // How many of the first rows can be multiplied where nothing may be read behind them.
  static int64_t alone(int64_t rows) { return rows / 4 * 4; } // as `rounded_height` has them

  void take(const uint8_t* q, int64_t rows, int64_t depth) { q_ = q, rows_ = rows, depth_ = depth; }

  // give(m, n, sums of columns n .. n + kWidth) of q (rows, depth) w, for kPanel columns
  template <typename F>
  void multiply(const int8_t* panel, const F& give) {
    const int64_t height = rounded_height(rows_);
    c_.resize(height * kPanel);
    unit_.held = true;
    at::native::cpublas::brgemm(height, kPanel, depth_, depth_, kPanel, kPanel, /*add_C=*/false, q_, panel, c_.data());
    for (int64_t m = 0; m < rows_; ++m) {
      for (int64_t n = 0; n < kPanel; n += kWidth) {
        give(m, n, Whole::loadu(c_.data() + m * kPanel + n));
      }
    }
  }

 private:
  HeldUnit unit_;
  const uint8_t* q_;
  int64_t rows_, depth_;
  std::vector<int32_t> c_;
};
#else // by way of 16 bits
class PanelProducts {
 public:
  static constexpr int64_t kRows = 16 * kQuadRows; // at once

  static bool are_there(int64_t rows) { return rows > kFewTokens; }

  static int64_t alone(int64_t rows) { return rows; }

  // rows are widened once for all panels
  void take(const uint8_t* q, int64_t rows, int64_t depth) {
    rows_ = rows, depth_ = depth;
    wide_.resize(rows * depth);
    widen(q, rows * depth, wide_.data());
  }

  template <typename F>
  void multiply(const int8_t* panel, const F& give) const {
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
