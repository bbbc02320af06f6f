// Experts in fp32, on the weights as they are.
#pragma once

#include "activations.h"
#include "plan.h"
#include "problem.h"
#include "products.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace d2dmoe {

class FloatExperts {
 public:
  static constexpr int64_t kMinBlock = 96; // tokens a thread, below which experts are dealt out to threads as well
  static constexpr int64_t kMaxBlock = 512; // tokens of a task
  FloatExperts(
      const Problem& problem, const at::Tensor& x, const at::Tensor& up, const std::optional<at::Tensor>& gate,
      const at::Tensor& down)
      : problem_(problem),
        x_(x.const_data_ptr<float>()),
        up_(up.const_data_ptr<float>()),
        gate_(gate ? gate->const_data_ptr<float>() : nullptr),
        down_(down.const_data_ptr<float>()) {}

  // y = start + the sum of expert(x[first + rows]) of a range of experts; `start` (d_out,), or null for zeros.
  void run(const Block& block, const float* start, float* y) {
    start_rows(start, block.tokens, problem_.outputs, y, problem_.outputs);
    block.each([&](int64_t e) { run(e, block.first, block.rows(e), block.count(e), y); });
  }

 private:
  void run(int64_t expert, int64_t first, const int32_t* rows, int64_t count, float* y) {
    const float* x = x_ + first * problem_.width;
    const int64_t d = problem_.width, s = problem_.neurons;
    const int64_t step = std::min(s, kNeuronsAtOnce);
    const int64_t height = std::min(count, kTokensAtOnce);
    grow(hidden_, height * step);
    if (gate_ != nullptr) grow(gated_, height * step);
    for (int64_t m = 0; m < count; m += kTokensAtOnce) {
      const int64_t tokens = std::min(kTokensAtOnce, count - m);
      for (int64_t n = 0; n < s; n += step) {
        const int64_t neurons = std::min(step, s - n), first = expert * s + n;
        dot_product(x, d, rows + m, tokens, up_ + first * d, neurons, hidden_.data(), step);
        if (gate_ != nullptr) dot_product(x, d, rows + m, tokens, gate_ + first * d, neurons, gated_.data(), step);
        activate(
            problem_.activation, hidden_.data(), at(problem_.up_bias, first),
            gate_ == nullptr ? nullptr : gated_.data(),
            at(problem_.gate_bias, first), tokens, neurons, step, problem_.cutoffs);
        add_product(
            hidden_.data(), step, neurons, down_ + first * problem_.outputs, problem_.outputs, y, rows + m, tokens);
      }
    }
  }

  static constexpr int64_t kTokensAtOnce = 96;
  static constexpr int64_t kNeuronsAtOnce = 128;
  Problem problem_;
  const float *x_, *up_, *gate_, *down_;
  std::vector<float> hidden_, gated_; // (kTokensAtOnce, step)
};

} // namespace d2dmoe
