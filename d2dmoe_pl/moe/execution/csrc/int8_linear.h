// A linear layer in int8: rows are quantised as they come, a scale each; the product is ATen's brgemm, by VNNI or AMX.
#pragma once

#include "int8_products.h"
#include "packed.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace d2dmoe {

// out (M, N) = x (M, K) w^T + bias; w (N, K) as `in_panels` gives it, with a scale and 128 times the sum of each row.
template <typename T>
void int8_linear(
    const T* x, int64_t rows, int64_t depth, const int8_t* w, const float* scale, const int32_t* less,
    const float* bias, int64_t columns, T* out) {
  constexpr int64_t kRows = 64, kColumns = kPanel; // at once
  const int64_t ld = quads(depth) * 4;
  const int64_t blocks = (rows + kRows - 1) / kRows, panels = (columns + kColumns - 1) / kColumns;
  // few rows: threads share columns, and each quantises all rows
  const int64_t shares = std::clamp<int64_t>(at::get_num_threads() / blocks, 1, panels);
  at::parallel_for(0, blocks * shares, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(depth), scales(kRows);
    std::vector<uint8_t> q(kRows * ld);
    std::vector<int32_t> c(kRows * kColumns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / shares * kRows, count = std::min(kRows, rows - first), share = task % shares;
      const int64_t height = rounded_height(count);
      for (int64_t m = 0; m < count; ++m) {
        const T* from = x + (first + m) * depth;
        if constexpr (std::is_same_v<T, float>) {
          scales[m] = quantise(from, depth, /*from_zero=*/false, q.data() + m * ld);
        } else {
          at::vec::convert(from, row.data(), depth);
          scales[m] = quantise(row.data(), depth, /*from_zero=*/false, q.data() + m * ld);
        }
      }
      for (int64_t n = share * panels / shares * kColumns; n < std::min(columns, (share + 1) * panels / shares * kColumns);
           n += kColumns) {
        const int64_t width = std::min(kColumns, columns - n);
        at::native::cpublas::brgemm(
            height, kColumns, ld, ld, kColumns, kColumns, /*add_C=*/false, q.data(), w + n * ld, c.data());
        for (int64_t m = 0; m < count; ++m) {
          dequantise(
              c.data() + m * kColumns, less + n, scale + n, scales[m], bias == nullptr ? nullptr : bias + n, width,
              out + (first + m) * columns + n);
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

} // namespace d2dmoe
