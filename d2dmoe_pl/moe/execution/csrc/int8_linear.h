// Linear layers in int8 that share their input: rows are quantised as they come, a scale each, once for all of them; the
// products are ATen's brgemm, by VNNI or AMX, or this package's, by AVX2. Without VNNI a handful of rows is not rounded and
// is multiplied with the numbers as they are; without AVX2 no row is, and more are multiplied with a copy in fp32.
#pragma once

#include "few_tokens.h"
#include "int8_products.h"
#include "panel_products.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace d2dmoe {

// out (M, N) = x (M, K) w^T + bias.
template <typename T>
struct Int8Linear {
  const int8_t* w; // (N, K) as `in_panels` gives it
  const float* scale; // of each row of w
  const int32_t* less; // 128 times their sums
  const float* bias; // or null
  int64_t columns; // N
  T* out; // rows `apart` from one another
};

template <typename In, typename Out>
void int8_linears(
    const In* x, int64_t rows, int64_t depth, const std::vector<Int8Linear<Out>>& linears, int64_t apart) {
  constexpr int64_t kRows = PanelProducts::kRows;
  const int64_t ld = quads(depth) * 4;
  std::vector<std::pair<const Int8Linear<Out>*, int64_t>> panels; // and their first columns
  for (const auto& linear : linears) {
    for (int64_t n = 0; n < linear.columns; n += kPanel) panels.emplace_back(&linear, n);
  }
  const int64_t blocks = (rows + kRows - 1) / kRows, count_panels = panels.size();
  // few rows: threads share columns, and each quantises all rows
  const int64_t shares = std::clamp<int64_t>(at::get_num_threads() / blocks, 1, count_panels);
  at::parallel_for(0, blocks * shares, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(depth), scales(kRows);
    std::vector<uint8_t> q(kRows * ld);
    PanelProducts products;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / shares * kRows, count = std::min(kRows, rows - first), share = task % shares;
      for (int64_t m = 0; m < count; ++m) {
        const float* from = in_floats(x + (first + m) * depth, row.data(), depth);
        scales[m] = quantise(from, depth, /*from_zero=*/false, q.data() + m * ld);
      }
      products.take(q.data(), count, ld);
      for (int64_t panel = share * count_panels / shares; panel < (share + 1) * count_panels / shares; ++panel) {
        const auto& [linear, n] = panels[panel];
        const int64_t width = std::min(kPanel, linear->columns - n);
        products.multiply(linear->w + n * ld, [&](int64_t m, int64_t i, Whole sums) {
          if (i >= width) return;
          const int64_t count = std::min(kWidth, width - i), at = n + i;
          const Vec value = dequantised(sums, linear->less + at, linear->scale + at, scales[m], count);
          const Vec biased = linear->bias == nullptr ? value : value + Vec::loadu(linear->bias + at, count);
          store_as(biased, linear->out + (first + m) * apart + at, count);
        });
      }
    }
  });
}

// out (M, N), rows `apart`, = x (M, K) w^T + bias for a handful of rows, which are not rounded, on numbers (N, K).
template <typename T>
void few_rows_linear(
    const T* x, int64_t rows, int64_t depth, const int8_t* w, const float* scale, const float* bias, int64_t columns,
    T* out, int64_t apart) {
  constexpr int64_t kColumns = 32; // whose numbers stay in the cache from row to row
  std::vector<float> wide(rows * depth);
  at::vec::convert(x, wide.data(), rows * depth);
  at::parallel_for(0, (columns + kColumns - 1) / kColumns, 8, [&](int64_t begin, int64_t end) {
    float sums[kColumns];
    for (int64_t n = begin * kColumns; n < std::min(columns, end * kColumns); n += kColumns) {
      const int64_t count = std::min(kColumns, columns - n);
      for (int64_t m = 0; m < rows; ++m) {
        dot_rows(wide.data() + m * depth, depth, w + n * depth, scale + n, count, sums, w + columns * depth);
        for (int64_t i = 0; i < count; ++i) out[m * apart + n + i] = bias == nullptr ? sums[i] : sums[i] + bias[n + i];
      }
    }
  });
}

} // namespace d2dmoe
