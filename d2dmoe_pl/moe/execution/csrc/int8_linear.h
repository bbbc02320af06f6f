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

// What becomes of the sums of a panel: values, since it is called too often to look for them in many places.
template <typename T>
struct PanelOutputs {
  const float *scale, *bias; // of the panel's columns
  const int32_t* less;
  const float* of_row;
  T* out;
  int64_t apart, columns;

  PanelOutputs(const Int8Linear<T>& linear, int64_t n, int64_t first, int64_t apart, const float* of_row)
      : scale(linear.scale + n), bias(linear.bias == nullptr ? nullptr : linear.bias + n), less(linear.less + n),
        of_row(of_row), out(linear.out + first * apart + n), apart(apart),
        columns(std::min(PanelProducts::kColumns, linear.columns - n)) {}

  void operator()(int64_t m, int64_t i, Whole sums) const {
    if (i >= columns) return;
    const int64_t count = std::min(kWidth, columns - i);
    const Vec value = dequantised(sums, less + i, scale + i, of_row[m], count);
    store_as(bias == nullptr ? value : value + Vec::loadu(bias + i, count), out + m * apart + i, count);
  }
};

template <typename In, typename Out>
void int8_linears(
    const In* x, int64_t rows, int64_t depth, const std::vector<Int8Linear<Out>>& linears, int64_t apart) {
  const int64_t ld = PanelProducts::apart(depth), wide = panel_depth(depth), threads = at::get_num_threads();
  std::vector<std::pair<const Int8Linear<Out>*, int64_t>> panels; // and their first columns
  for (const auto& linear : linears) {
    for (int64_t n = 0; n < linear.columns; n += PanelProducts::kColumns) panels.emplace_back(&linear, n);
  }
  int64_t blocks = (rows + PanelProducts::kRows - 1) / PanelProducts::kRows;
  if (blocks > 1) blocks = (blocks + threads - 1) / threads * threads; // as many for each thread
  constexpr int64_t kWhole = 32; // rows, which are multiplied fastest
  const int64_t some = (rows + blocks * kWhole - 1) / (blocks * kWhole) * kWhole, count_panels = panels.size();
  blocks = (rows + some - 1) / some;
  // few rows: threads share columns, and each quantises all rows
  const int64_t shares = std::clamp<int64_t>(threads / blocks, 1, count_panels);
  at::parallel_for(0, blocks * shares, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(depth), scales(some);
    std::vector<uint8_t> q((some + kBehind) * ld);
    PanelProducts products;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / shares * some, count = std::min(some, rows - first), share = task % shares;
      for (int64_t m = 0; m < count; ++m) {
        const float* from = in_floats(x + (first + m) * depth, row.data(), depth);
        scales[m] = quantise(from, depth, /*from_zero=*/false, q.data() + m * ld);
      }
      products.take(q.data(), count, ld, depth);
      for (int64_t panel = share * count_panels / shares; panel < (share + 1) * count_panels / shares; ++panel) {
        const int64_t n = panels[panel].second;
        const PanelOutputs<Out> outputs{*panels[panel].first, n, first, apart, scales.data()};
        products.multiply(panels[panel].first->w + n * wide, whole_panels(outputs.columns), outputs);
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
