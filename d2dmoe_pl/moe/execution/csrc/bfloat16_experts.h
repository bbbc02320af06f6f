// Experts in bf16 by ATen's brgemm, which runs on AMX where there is any, on packed weights.
#pragma once

#include "activations.h"
#include "hidden_rows.h"
#include "packed.h"
#include "problem.h"
#include "tiles.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace d2dmoe {

class BFloat16Experts {
 public:
  using scalar = at::BFloat16;
  static constexpr int64_t kMinBlock = 32; // tokens a thread, below which experts are dealt out to threads as well
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

  // y = start + the sum of expert(x[first + rows]) of a range of experts; `start` (d_out,), or null for zeros.
  void run(const Block& block, const float* start, float* y) {
    narrow_.run(
        block, start, problem_.outputs, y, [&](int64_t expert) { first_products(expert, block); },
        [&] { second_products(); });
  }

 private:
  static constexpr int64_t kTokensAtOnce = 96;
  static constexpr int64_t kNeuronsAtOnce = 64; // even, so that pairs of rows stay whole
  static constexpr int64_t kColumnsAtOnce = 256;

  int64_t step() const { return std::min(problem_.neurons, kNeuronsAtOnce); }

  // narrow_ gets those of one expert
  void first_products(int64_t expert, const Block& block) {
    const scalar* x = x_ + block.first * problem_.width;
    const int64_t d = problem_.width, s = problem_.neurons, depth = even(d), ld = even(step());
    for (int64_t m = 0; m < block.count(expert); m += kTokensAtOnce) {
      const int32_t* rows = block.rows(expert) + m;
      const int64_t tokens = std::min(kTokensAtOnce, block.count(expert) - m), height = rounded_height(tokens);
      // neighbouring rows, as when every token runs, are read where they are
      const bool in_place = rows[tokens - 1] - rows[0] == tokens - 1 && height == tokens && depth == d;
      if (!in_place) {
        grow(tokens_, height * depth);
        gather_rows(x, d, rows, tokens, depth, tokens_.data());
      }
      const scalar* a = in_place ? x + rows[0] * d : tokens_.data();
      grow(hidden_, height * step());
      if (gate_ != nullptr) grow(gated_, height * step());
      for (int64_t n = 0; n < s; n += step()) {
        const int64_t neurons = std::min(step(), s - n);
        first_product(a, up_ + expert * depth * s + 2 * n, height, neurons, depth, hidden_.data(), step());
        if (gate_ != nullptr) {
          first_product(a, gate_ + expert * depth * s + 2 * n, height, neurons, depth, gated_.data(), step());
        }
        activate(
            problem_.activation, hidden_.data(), at(problem_.up_bias, expert * s + n),
            gate_ == nullptr ? nullptr : gated_.data(), at(problem_.gate_bias, expert * s + n), tokens, neurons, step(),
            problem_.cutoffs);
        scalar* narrow = narrow_.add(expert, n / step(), rows, tokens, ld);
        for (int64_t i = 0; i < tokens; ++i) {
          at::vec::convert(hidden_.data() + i * step(), narrow + i * ld, neurons);
          if (neurons % 2 == 1) narrow[i * ld + neurons] = 0.f;
        }
      }
    }
  }

  void first_product(
      const scalar* a, const scalar* weight, int64_t rows, int64_t neurons, int64_t depth, float* out, int64_t ld) {
    unit_.held = true;
    at::native::cpublas::brgemm(rows, neurons, depth, depth, problem_.neurons, ld, /*add_C=*/false, a, weight, out);
  }

  void second_products() {
    const int64_t outputs = problem_.outputs, pairs = even(step()) / 2;
    const bool is_regular = outputs % Tiles::kColumns == 0 && problem_.neurons % step() == 0;
    if (is_regular && tiles_may_be_used()) {
      unit_.release();
      const Tiles tiles(pairs);
      narrow_.add_outputs<Tiles::kColumns>(
          [&](const Part& part, const Part*, int64_t first, int64_t columns, float* to, int64_t ld) {
            for (int64_t n = 0; n < columns; n += Tiles::kColumns) {
              tiles.add_bfloat16(
                  narrow_.of(part), 2 * pairs, down_of(part) + 2 * (first + n), outputs, to + n, ld, part.rows,
                  part.count);
            }
          });
    } else {
      narrow_.add_outputs<kColumnsAtOnce>(
          [&](const Part& part, const Part*, int64_t first, int64_t columns, float* to, int64_t ld) {
            add_product(part, first, columns, to, ld);
          });
    }
  }

  const scalar* down_of(const Part& part) const {
    return down_ + (part.expert * even(problem_.neurons) + part.chunk * step()) * problem_.outputs;
  }

  // y[rows] += the columns from `first` on of what a part gives
  void add_product(const Part& part, int64_t first, int64_t columns, float* y, int64_t y_ld) {
    const int64_t neurons = even(std::min(step(), problem_.neurons - part.chunk * step()));
    const int64_t height = rounded_height(part.count);
    grow(sums_, height * kColumnsAtOnce);
    unit_.held = true;
    for (int64_t n = 0; n < columns; n += kColumnsAtOnce) {
      const int64_t here = std::min(kColumnsAtOnce, columns - n);
      at::native::cpublas::brgemm(
          height, here, neurons, even(step()), problem_.outputs, kColumnsAtOnce, /*add_C=*/false, narrow_.of(part),
          down_of(part) + 2 * (first + n), sums_.data());
      for (int64_t i = 0; i < part.count; ++i) {
        float* to = y + part.rows[i] * y_ld + n;
        at::vec::map2<float>([](Vec a, Vec b) { return a + b; }, to, to, sums_.data() + i * kColumnsAtOnce, here);
      }
    }
  }

  Problem problem_;
  const scalar *x_, *up_, *gate_, *down_;
  HeldUnit unit_;
  HiddenRows<scalar> narrow_;   // (rows, even(step()))
  std::vector<scalar> tokens_; // (kTokensAtOnce, even(d))
  std::vector<float> hidden_, gated_, sums_;
};

} // namespace d2dmoe
