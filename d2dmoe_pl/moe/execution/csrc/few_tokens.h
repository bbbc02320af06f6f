// Products for a handful of tokens, as when text is written: a token at a time against rows of weights as they are.
// What counts there is that each weight is read once, and that nothing is called, packed or gathered for it; a matrix
// unit takes longer to begin than all of it lasts.
#pragma once

#include "activations.h"
#include "plan.h"
#include "problem.h"
#include "products.h"

#include <ATen/ATen.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace d2dmoe {

constexpr int64_t kFewTokens = 4;
constexpr int64_t kPair = 2 * kWidth; // floats of two vectors

using Pair = std::array<Vec, 2>;

// The first `count` of kPair values, as floats; zeros behind them.
inline Pair load_pair(const float* values, int64_t count) {
  if (count >= kPair) return {Vec::loadu(values), Vec::loadu(values + kWidth)};
  const int64_t first = std::min(count, kWidth);
  return {Vec::loadu(values, first), count > kWidth ? Vec::loadu(values + kWidth, count - kWidth) : Vec(0.f)};
}

inline Pair load_pair(const at::BFloat16* values, int64_t count) {
  using Narrow = at::vec::Vectorized<at::BFloat16>;
  const Narrow narrow = count >= kPair ? Narrow::loadu(values) : Narrow::loadu(values, count);
  const auto [low, high] = at::vec::convert_to_float<at::BFloat16>(narrow);
  return {low, high};
}

inline void store_pair(const Pair& pair, float* values, int64_t count) {
  pair[0].store(values, std::min(count, kWidth));
  if (count > kWidth) pair[1].store(values + kWidth, std::min(count - kWidth, kWidth));
}

// out[n] = sum_k x[k] w[n][k], of w (rows, depth).
template <typename T>
void dot_rows(const float* x, int64_t depth, const T* w, int64_t rows, float* out) {
  for (int64_t n = 0; n < rows; n += kNeurons) {
    const int64_t here = std::min<int64_t>(kNeurons, rows - n);
    const T* row[kNeurons];
    for (int64_t i = 0; i < kNeurons; ++i) row[i] = w + (n + std::min(i, here - 1)) * depth;
    Vec sums[kNeurons][2] = {{Vec(0.f), Vec(0.f)}, {Vec(0.f), Vec(0.f)}, {Vec(0.f), Vec(0.f)}, {Vec(0.f), Vec(0.f)}};
    for (int64_t k = 0; k < depth; k += kPair) {
      const int64_t count = std::min(kPair, depth - k);
      const Pair xs = load_pair(x + k, count);
#pragma GCC unroll 4
      for (int i = 0; i < kNeurons; ++i) {
        const Pair ws = load_pair(row[i] + k, count);
        for (int half = 0; half < 2; ++half) sums[i][half] = at::vec::fmadd(xs[half], ws[half], sums[i][half]);
      }
    }
    Vec total[kNeurons];
    for (int i = 0; i < kNeurons; ++i) total[i] = sums[i][0] + sums[i][1];
    float four[kNeurons];
    store_sums(total, four);
    std::copy_n(four, here, out + n);
  }
}

// y[n] += sum_j a[j] w[j][n], of w (rows, width).
template <typename T>
void add_rows(const float* a, int64_t rows, const T* w, int64_t width, float* y) {
  constexpr int64_t kRows = 4; // at once, each read from its begin to its end
  for (int64_t j = 0; j < rows; j += kRows) {
    const int64_t here = std::min(kRows, rows - j);
    for (int64_t n = 0; n < width; n += kPair) {
      const int64_t count = std::min(kPair, width - n);
      Pair sum = load_pair(y + n, count);
      for (int64_t i = 0; i < here; ++i) {
        const Pair ws = load_pair(w + (j + i) * width + n, count);
        for (int half = 0; half < 2; ++half) sum[half] = at::vec::fmadd(Vec(a[j + i]), ws[half], sum[half]);
      }
      store_pair(sum, y + n, count);
    }
  }
}

// Experts in bf16 on the weights as they are, up and gate (E, s, d), down (E, s, d_out).
class FewTokensExperts {
 public:
  static constexpr int64_t kMaxBlock = kFewTokens;
  FewTokensExperts(
      const Problem& problem, const at::Tensor& x, const at::Tensor& up, const std::optional<at::Tensor>& gate,
      const at::Tensor& down)
      : problem_(problem),
        up_(up.const_data_ptr<at::BFloat16>()),
        gate_(gate ? gate->const_data_ptr<at::BFloat16>() : nullptr),
        down_(down.const_data_ptr<at::BFloat16>()),
        x_(x.numel()),
        hidden_(problem.neurons),
        gated_(gate ? problem.neurons : 0) {
    at::vec::convert(x.const_data_ptr<at::BFloat16>(), x_.data(), x.numel());
  }

  // y[rows] += expert(x[first + rows]) of a range of experts, without the output bias.
  void run(const Block& block, float* y) {
    for (int64_t e = block.begin; e < block.end; ++e) run(e, block.first, block.rows(e), block.count(e), y);
  }

 private:
  void run(int64_t expert, int64_t first, const int32_t* rows, int64_t count, float* y) {
    const int64_t d = problem_.width, s = problem_.neurons, d_out = problem_.outputs;
    for (int64_t i = 0; i < count; ++i) {
      const float* x = x_.data() + (first + rows[i]) * d;
      dot_rows(x, d, up_ + expert * s * d, s, hidden_.data());
      if (gate_ != nullptr) dot_rows(x, d, gate_ + expert * s * d, s, gated_.data());
      activate(
          problem_.activation, hidden_.data(), at(problem_.up_bias, expert * s),
          gate_ == nullptr ? nullptr : gated_.data(), at(problem_.gate_bias, expert * s), 1, s, s);
      add_rows(hidden_.data(), s, down_ + expert * s * d_out, d_out, y + rows[i] * d_out);
    }
  }

  Problem problem_;
  const at::BFloat16 *up_, *gate_, *down_;
  std::vector<float> x_, hidden_, gated_; // (N, d), (s,), (s,)
};

// y (N, d_out) += share (up (down x) + mean), of x (N, d), shares (N,), down (R, d), and up (R + 1, d_out), whose last
// row is the mean.
template <typename T>
void add_stand_in_rows(
    const T* x, int64_t tokens, int64_t width, const float* shares, const T* down, int64_t rank, const T* up,
    int64_t outputs, T* y) {
  std::vector<float> row(width), inner(rank + 1), sum(outputs);
  for (int64_t t = 0; t < tokens; ++t) {
    if (shares[t] == 0.f) continue;
    at::vec::convert(x + t * width, row.data(), width);
    dot_rows(row.data(), width, down, rank, inner.data());
    inner[rank] = 1.f;
    for (float& each : inner) each *= shares[t];
    at::vec::convert(y + t * outputs, sum.data(), outputs);
    add_rows(inner.data(), rank + 1, up, outputs, sum.data());
    at::vec::convert(sum.data(), y + t * outputs, outputs);
  }
}

} // namespace d2dmoe
