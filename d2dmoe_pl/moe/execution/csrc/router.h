// Scores of the experts by a router of two layers, |down relu(up x)|, and which of them a gate admits.
#pragma once

#include "activations.h"
#include "few_tokens.h"
#include "int8_experts.h"
#include "packed.h"
#include "panel_products.h"
#include "products.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

namespace d2dmoe {

// Sizes and biases (null for none) of a router; its weights are in a form for the type of the tokens.
struct RouterProblem {
  int64_t width;   // d
  int64_t hidden;  // R
  int64_t experts; // E
  const float* up_bias;
  const float* down_bias;
};

// Weights (R, d) and (E, R) as they are.
class FloatRouter {
 public:
  using scalar = float;
  FloatRouter(const RouterProblem& problem, const float* up, const float* down)
      : problem_(problem), up_(up), down_(down) {}

  // scores (count, E) of tokens x (count, d), without the last bias and absolute value
  void run(const float* x, int64_t count, float* scores) {
    const auto& p = problem_;
    if (static_cast<int64_t>(rows_.size()) < count) {
      rows_.resize(count);
      std::iota(rows_.begin(), rows_.end(), 0);
    }
    hidden_.resize(count * p.hidden);
    dot_product(x, p.width, rows_.data(), count, up_, p.hidden, hidden_.data(), p.hidden);
    activate(Activation::relu, hidden_.data(), p.up_bias, nullptr, nullptr, count, p.hidden, p.hidden);
    dot_product(hidden_.data(), p.hidden, rows_.data(), count, down_, p.experts, scores, p.experts);
  }

 private:
  RouterProblem problem_;
  const float *up_, *down_;
  std::vector<int32_t> rows_;
  std::vector<float> hidden_; // (count, R)
};

// Weights transposed, in pairs.
class BFloat16Router {
 public:
  using scalar = at::BFloat16;
  BFloat16Router(const RouterProblem& problem, const scalar* up, const scalar* down)
      : problem_(problem), up_(up), down_(down) {}

  void run(const scalar* x, int64_t count, float* scores) {
    const auto& p = problem_;
    const int64_t d = p.width, depth = even(d), ld = even(p.hidden);
    const int64_t height = rounded_height(count); // so many rows are computed, of which nobody reads the last
    if (depth != d || height != count) {
      tokens_.assign(height * depth, scalar(0.f));
      for (int64_t i = 0; i < count; ++i) std::copy_n(x + i * d, d, tokens_.data() + i * depth);
      x = tokens_.data();
    }
    hidden_.resize(height * p.hidden);
    narrow_.assign(height * ld, scalar(0.f));
    scores_.resize(height * p.experts);
    unit_.held = true;
    at::native::cpublas::brgemm(height, p.hidden, depth, depth, p.hidden, p.hidden, false, x, up_, hidden_.data());
    activate(Activation::relu, hidden_.data(), p.up_bias, nullptr, nullptr, count, p.hidden, p.hidden);
    for (int64_t i = 0; i < count; ++i) {
      at::vec::convert(hidden_.data() + i * p.hidden, narrow_.data() + i * ld, p.hidden);
    }
    at::native::cpublas::brgemm(
        height, p.experts, ld, ld, p.experts, p.experts, false, narrow_.data(), down_, scores_.data());
    std::copy_n(scores_.data(), count * p.experts, scores);
  }

 private:
  RouterProblem problem_;
  const scalar *up_, *down_;
  HeldUnit unit_;
  std::vector<scalar> tokens_, narrow_;
  std::vector<float> hidden_, scores_;
};

// A handful of tokens, on the weights as they are, in bf16 or int8; scales of their rows may be null.
template <typename X, typename W>
class FewTokensRouter {
 public:
  using scalar = X;
  FewTokensRouter(
      const RouterProblem& problem, const W* up, const float* up_scale, const W* down, const float* down_scale)
      : problem_(problem),
        up_(up),
        down_(down),
        up_scale_(up_scale),
        down_scale_(down_scale),
        token_(problem.width),
        hidden_(problem.hidden) {}

  void run(const X* x, int64_t count, float* scores) {
    const auto& p = problem_;
    for (int64_t t = 0; t < count; ++t) {
      at::vec::convert(x + t * p.width, token_.data(), p.width);
      dot_rows(token_.data(), p.width, up_, up_scale_, p.hidden, hidden_.data());
      activate(Activation::relu, hidden_.data(), p.up_bias, nullptr, nullptr, 1, p.hidden, p.hidden);
      dot_rows(hidden_.data(), p.hidden, down_, down_scale_, p.experts, scores + t * p.experts);
    }
  }

 private:
  RouterProblem problem_;
  const W *up_, *down_;
  const float *up_scale_, *down_scale_;
  std::vector<float> token_, hidden_; // (d,), (R,)
};

#if defined(D2DMOE_INT8)

// Weights in int8 with a scale for each of their rows; tokens too. `up_panels` and `down_panels` are the same weights for
// many tokens at once; null where there is no brgemm.
class Int8Router {
 public:
  using scalar = uint8_t;
  Int8Router(
      const RouterProblem& problem, const Int8Tokens& x, const Int8Up& up, const Int8Up& down, const int8_t* up_panels,
      const int8_t* down_panels)
      : problem_(problem),
        x_(x.values.const_data_ptr<uint8_t>()),
        scale_(x.scale.const_data_ptr<float>()),
        up_(up),
        down_(down),
        up_panels_(up_panels),
        down_panels_(down_panels) {}

  void run(const uint8_t* x, int64_t count, float* scores) {
    const auto& p = problem_;
    hidden_.resize(count * p.hidden);
    narrow_.resize((count + kBehind) * p.hidden + kLineBehind);
    scales_.resize(count);
    product(x, p.width, scale_ + (x - x_) / p.width, up_, up_panels_, p.hidden, count, hidden_.data());
    activate(Activation::relu, hidden_.data(), p.up_bias, nullptr, nullptr, count, p.hidden, p.hidden);
    for (int64_t i = 0; i < count; ++i) {
      scales_[i] = quantise(hidden_.data() + i * p.hidden, p.hidden, /*from_zero=*/false, narrow_.data() + i * p.hidden);
    }
    product(narrow_.data(), p.hidden, scales_.data(), down_, down_panels_, p.experts, count, scores);
  }

 private:
  // out (count, columns) = x (count, depth) w^T
  void product(
      const uint8_t* x, int64_t depth, const float* x_scale, const Int8Up& w, const int8_t* panels, int64_t columns,
      int64_t count, float* out) {
    const bool in_tiles = panels != nullptr && depth % 4 == 0 && count >= kManyTokens;
    if (!in_tiles) {
      while (static_cast<int64_t>(rows_.size()) < count) rows_.push_back(static_cast<int32_t>(rows_.size()));
      return int8_dot_product(x, depth, x_scale, rows_.data(), count, w.rows(0, depth), columns, out, columns);
    }
    products_.take(x, count, depth, depth);
    for (int64_t n = 0; n < columns; n += PanelProducts::kColumns) {
      const int64_t here = whole_panels(std::min(PanelProducts::kColumns, columns - n));
      products_.multiply(panels + n * panel_depth(depth), here, [&](int64_t m, int64_t i, Whole sums) {
        const int64_t at = n + i, some = std::min(kWidth, columns - at);
        if (some > 0) dequantised(sums, w.sums + at, w.scale + at, x_scale[m], some).store(out + m * columns + at, some);
      });
    }
  }

  RouterProblem problem_;
  const uint8_t* x_;
  const float* scale_;
  Int8Up up_, down_;
  const int8_t *up_panels_, *down_panels_;
  PanelProducts products_;
  std::vector<int32_t> rows_; // 0, 1, 2, ...
  std::vector<float> hidden_, scales_;
  std::vector<uint8_t> narrow_;
};

#endif

// A gating rule of moe/gating at a tau, or at a k where that is positive.
struct Gate {
  enum class Rule { dynk_max, dynk_cumulative, topk } rule;
  double tau;
  int64_t k;

  Gate(const std::string& name, double tau, int64_t k) : rule(named(name)), tau(tau), k(k) {}

  static Rule named(const std::string& name) {
    if (name == "dynk_max") return Rule::dynk_max;
    if (name == "dynk_cumulative") return Rule::dynk_cumulative;
    if (name == "topk") return Rule::topk;
    TORCH_CHECK_VALUE(false, "rule='", name, "': allowed are dynk_max, dynk_cumulative, topk");
  }

  // Whether every expert runs, whatever its score.
  bool admits_all(int64_t experts) const { return k > 0 ? k >= experts : tau >= 1.0; }

  // scores, not negative, and mask: (E,) of one token; order: work space
  void choose(const float* scores, bool* mask, int64_t experts, std::vector<uint64_t>& order) const {
    if (rule == Rule::dynk_max) {
      Vec most(0.f);
      for (int64_t e = 0; e < experts; e += kWidth) {
        most = at::vec::maximum(most, Vec::loadu(scores + e, std::min(kWidth, experts - e)));
      }
      const float least = static_cast<float>(1.0 - tau) * largest_lane(most);
      for (int64_t e = 0; e < experts; ++e) mask[e] = !(scores[e] < least); // a NaN runs and shows in the output
      return;
    }
    if (admits_all(experts)) {
      std::fill_n(mask, experts, true);
      return;
    }
    order.resize(experts);
    for (int64_t e = 0; e < experts; ++e) order[e] = key(scores[e], e);
    std::fill_n(mask, experts, false);
    if (rule == Rule::topk) {
      const double share = std::ceil(tau * static_cast<double>(experts) - 1e-9);
      const int64_t count = k > 0 ? k : std::max<int64_t>(1, static_cast<int64_t>(share));
      std::nth_element(order.begin(), order.begin() + count - 1, order.end());
      for (int64_t i = 0; i < count; ++i) mask[expert(order[i])] = true;
      return;
    }
    choose_share(scores, mask, order);
  }

 private:
  // Ascending keys are experts from the largest score on, NaN before all, and equal ones as they stand.
  static uint64_t key(float score, int64_t expert) {
    return static_cast<uint64_t>(~std::bit_cast<uint32_t>(score)) << 32 | static_cast<uint64_t>(expert);
  }

  static int64_t expert(uint64_t key) {
    return static_cast<int64_t>(key & 0xffffffff);
  }

  // The fewest experts, from the largest on, whose sum reaches tau of that of all, and one at least. Only the part where
  // that happens is sorted, which the rest is halved down to: to sort all takes longer than a token's experts.
  void choose_share(const float* scores, bool* mask, std::vector<uint64_t>& order) const {
    constexpr int64_t kSorted = 16;
    const auto sum_of = [&](auto first, auto last) { // in float64, and compared in float32, as torch does
      double sum = 0.;
      for (auto each = first; each != last; ++each) sum += scores[expert(*each)];
      return sum;
    };
    const float enough = static_cast<float>(tau) * static_cast<float>(sum_of(order.begin(), order.end()));
    const auto run = [&](auto first, auto last) {
      for (auto each = first; each != last; ++each) mask[expert(*each)] = true;
    };
    auto first = order.begin(), last = order.end();
    double before = 0.; // of all that come before `first`
    while (last - first > kSorted) {
      const auto middle = first + (last - first) / 2;
      std::nth_element(first, middle, last);
      const double upper = sum_of(first, middle);
      if (static_cast<float>(before + upper) >= enough) {
        last = middle;
      } else { // a sum that is NaN is never enough
        run(first, middle);
        before += upper;
        first = middle;
      }
    }
    std::sort(first, last);
    for (auto each = first; each != last; ++each) {
      if (each != order.begin() && static_cast<float>(before) >= enough) return;
      mask[expert(*each)] = true;
      before += scores[expert(*each)];
    }
  }
};

// The share of a token's scores (E,) that those experts have which do not run: 0 where all run.
inline float skipped_share(const float* scores, const bool* mask, int64_t experts) {
  float all = 0.f, skipped = 0.f;
  for (int64_t e = 0; e < experts; ++e) {
    all += scores[e];
    if (!mask[e]) skipped += scores[e];
  }
  return skipped == 0.f ? 0.f : skipped / all;
}

// mask (count, E) of tokens x (count, d); the share that each skips, (count,), where that is not null
template <typename Router, typename T = typename Router::scalar>
void choose_experts(
    const Router& router, const RouterProblem& problem, const Gate& gate, const T* x, int64_t count, bool* mask,
    float* skipped) {
  constexpr int64_t kTokens = 32; // at once
  const int64_t experts = problem.experts;
  at::parallel_for(0, (count + kTokens - 1) / kTokens, 1, [&](int64_t begin, int64_t end) {
    Router own = router; // with its work space
    std::vector<float> scores(kTokens * experts);
    std::vector<uint64_t> order;
    for (int64_t first = begin * kTokens; first < std::min(count, end * kTokens); first += kTokens) {
      const int64_t tokens = std::min(kTokens, count - first);
      own.run(x + first * problem.width, tokens, scores.data());
      for (int64_t t = 0; t < tokens; ++t) {
        float* row = scores.data() + t * experts;
        for (int64_t e = 0; e < experts; e += kWidth) {
          const int64_t n = std::min(kWidth, experts - e);
          Vec value = Vec::loadu(row + e, n);
          if (problem.down_bias != nullptr) value = value + Vec::loadu(problem.down_bias + e, n);
          value.abs().store(row + e, n);
        }
        bool* chosen = mask + (first + t) * experts;
        gate.choose(row, chosen, experts, order);
        if (skipped != nullptr) skipped[first + t] = skipped_share(row, chosen, experts);
      }
    }
  });
}

} // namespace d2dmoe
