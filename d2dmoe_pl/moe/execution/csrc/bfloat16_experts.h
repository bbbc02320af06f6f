// Experts in bf16 by ATen's brgemm, which runs on AMX where there is any, on packed weights.
#pragma once

#include "activations.h"
#include "packed.h"
#include "problem.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace d2dmoe {

class BFloat16Experts {
 public:
  using scalar = at::BFloat16;
  static constexpr int64_t kMaxBlock = 512; // tokens of a task
  // Weights as `pack` gives them: up and gate transposed, down not.
  BFloat16Experts(
      const Problem& problem, const at::Tensor& x, const at::Tensor& up, const std::optional<at::Tensor>& gate,
      const at::Tensor& down)
      : problem_(problem),
        x_(x.const_data_ptr<scalar>()),
        up_(up.const_data_ptr<scalar>()),
        gate_(gate ? gate->const_data_ptr<scalar>() : nullptr),
        down_(down.const_data_ptr<scalar>()) {}

  ~BFloat16Experts() {
    if (used_) at::native::cpublas::brgemm_release();
  }

  // y[rows] += expert(x[first + rows]), without the output bias.
  void run(int64_t expert, int64_t first, const int32_t* rows, int64_t count, float* y) {
    used_ = true;
    const scalar* x = x_ + first * problem_.width;
    const int64_t d = problem_.width, s = problem_.neurons, depth = even(d);
    const int64_t step = std::min(s, kNeuronsAtOnce), ld = even(step);
    for (int64_t m = 0; m < count; m += kTokensAtOnce) {
      const int64_t tokens = std::min(kTokensAtOnce, count - m);
      const int64_t height = rounded_height(tokens);
      // neighbouring rows, as when every token runs, are read and added to where they are
      const bool in_place = rows[m + tokens - 1] - rows[m] == tokens - 1 && height == tokens && depth == d;
      const scalar* a = x + rows[m] * d;
      if (!in_place) a = gather(x, rows + m, tokens, height);
      grow(hidden_, height * step);
      if (gate_ != nullptr) grow(gated_, height * step);
      grow(narrow_, height * ld);
      grow(sums_, height * kColumnsAtOnce);
      for (int64_t n = 0; n < s; n += step) {
        const int64_t neurons = std::min(step, s - n);
        first_product(a, up_ + expert * depth * s + 2 * n, height, neurons, depth, hidden_.data(), step);
        if (gate_ != nullptr) {
          first_product(a, gate_ + expert * depth * s + 2 * n, height, neurons, depth, gated_.data(), step);
        }
        activate(
            problem_.activation, hidden_.data(), at(problem_.up_bias, expert * s + n),
            gate_ == nullptr ? nullptr : gated_.data(), at(problem_.gate_bias, expert * s + n), tokens, neurons, step);
        for (int64_t i = 0; i < tokens; ++i) {
          at::vec::convert(hidden_.data() + i * step, narrow_.data() + i * ld, neurons);
          if (neurons % 2 == 1) narrow_[i * ld + neurons] = 0.f;
        }
        second_product(
            down_ + (expert * even(s) + n) * problem_.outputs, height, tokens, even(neurons), ld, rows + m, y, in_place);
      }
    }
  }

 private:
  static constexpr int64_t kTokensAtOnce = 32;
  static constexpr int64_t kNeuronsAtOnce = 64; // even, so that pairs of rows stay whole
  static constexpr int64_t kColumnsAtOnce = 256;

  // A copy (height, even(d)) of rows of x, of which those past the last are not written.
  const scalar* gather(const scalar* x, const int32_t* rows, int64_t count, int64_t height) {
    const int64_t d = problem_.width, depth = even(d);
    grow(tokens_, height * depth);
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(x + rows[i] * d, d, tokens_.data() + i * depth);
      if (depth > d) tokens_[i * depth + d] = 0.f;
    }
    return tokens_.data();
  }

  void first_product(
      const scalar* a, const scalar* weight, int64_t rows, int64_t neurons, int64_t depth, float* out, int64_t ld) {
    at::native::cpublas::brgemm(rows, neurons, depth, depth, problem_.neurons, ld, /*add_C=*/false, a, weight, out);
  }

  void second_product(
      const scalar* weight, int64_t height, int64_t tokens, int64_t depth, int64_t ld, const int32_t* rows, float* y,
      bool in_place) {
    const int64_t d = problem_.outputs;
    for (int64_t n = 0; n < d; n += kColumnsAtOnce) {
      const int64_t columns = std::min(kColumnsAtOnce, d - n);
      if (in_place) {
        at::native::cpublas::brgemm(
            height, columns, depth, ld, d, d, /*add_C=*/true, narrow_.data(), weight + 2 * n, y + rows[0] * d + n);
        continue;
      }
      at::native::cpublas::brgemm(
          height, columns, depth, ld, d, kColumnsAtOnce, /*add_C=*/false, narrow_.data(), weight + 2 * n, sums_.data());
      for (int64_t i = 0; i < tokens; ++i) {
        const float* from = sums_.data() + i * kColumnsAtOnce;
        float* to = y + rows[i] * d + n;
        at::vec::map2<float>([](Vec a, Vec b) { return a + b; }, to, to, from, columns);
      }
    }
  }

  Problem problem_;
  const scalar *x_, *up_, *gate_, *down_;
  bool used_ = false;
  std::vector<scalar> tokens_, narrow_; // (kTokensAtOnce, even(d)), (kTokensAtOnce, even(step))
  std::vector<float> hidden_, gated_, sums_;
};

} // namespace d2dmoe
