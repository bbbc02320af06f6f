// Products for a handful of tokens, as when text is written: a token at a time against rows of weights as they are.
// What counts there is that each weight is read once, and that nothing is called, packed or gathered for it; a matrix
// unit takes longer to begin than all of it lasts.
#pragma once

#include "activations.h"
#include "plan.h"
#include "prefetch.h"
#include "problem.h"
#include "products.h"

#include <ATen/ATen.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
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

inline Pair load_pair(const int8_t* values, int64_t count) {
  int8_t own[kPair] = {};
  if (count < kPair) {
    std::copy_n(values, count, own);
    values = own;
  }
#if defined(CPU_CAPABILITY_AVX512)
  const auto wide = [](const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  };
  return {wide(values), wide(values + kWidth)};
#elif defined(CPU_CAPABILITY_AVX2)
  const auto wide = [](const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  };
  return {wide(values), wide(values + kWidth)};
#else
  float wide[kPair];
  std::copy_n(values, kPair, wide);
  return {Vec::loadu(wide), Vec::loadu(wide + kWidth)};
#endif
}

inline void store_pair(const Pair& pair, float* values, int64_t count) {
  pair[0].store(values, std::min(count, kWidth));
  if (count > kWidth) pair[1].store(values + kWidth, std::min(count - kWidth, kWidth));
}

// out[n] = sum_k x[k] w[n][k] scale[n], of w (rows, depth); scale may be null. Up to `end`, weights are read behind it.
// Rows where `by` (rows,) is 0 are not read, and what they give is not written; null for none.
template <typename T>
void dot_rows(
    const float* x, int64_t depth, const T* w, const float* scale, int64_t rows, float* out, const T* end = nullptr,
    const float* by = nullptr) {
  if (end == nullptr) end = w + rows * depth;
  for (int64_t n = 0; n < rows;) {
    int64_t index[kNeurons], here = 0;
    for (; n < rows && here < kNeurons; ++n) {
      index[here] = n;
      here += by == nullptr || by[n] != 0.f;
    }
    if (here == 0) return;
    const T* row[kNeurons];
    for (int64_t i = 0; i < kNeurons; ++i) row[i] = w + index[std::min(i, here - 1)] * depth;
    Vec sums[kNeurons][2] = {{Vec(0.f), Vec(0.f)}, {Vec(0.f), Vec(0.f)}, {Vec(0.f), Vec(0.f)}, {Vec(0.f), Vec(0.f)}};
    for (int64_t k = 0; k < depth; k += kPair) {
      const int64_t count = std::min(kPair, depth - k);
      const Pair xs = load_pair(x + k, count);
      ask_ahead(row[0] + k * kNeurons, kPair * kNeurons, end);
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
    for (int64_t i = 0; i < here; ++i) out[index[i]] = scale == nullptr ? four[i] : four[i] * scale[index[i]];
  }
}

// y[n] += scale[n] sum_j a[j] w[j][n], of w (rows, width), whose rows are not read where a is 0; scale may be null.
template <typename T>
void add_rows(const float* a, int64_t rows, const T* w, const float* scale, int64_t width, float* y) {
  constexpr int64_t kRows = 4; // at once, each read from its begin to its end
  int64_t seen = 0;
  const auto next = [&](int64_t* to) { // the rows that come after those seen, and how many they are
    int64_t found = 0;
    for (; seen < rows && found < kRows; ++seen) {
      to[found] = seen;
      found += a[seen] != 0.f;
    }
    return found;
  };
  int64_t row[kRows + 1], later[kRows + 1];
  int64_t here = next(row);
  while (here > 0) {
    const int64_t behind = next(later);
    for (int64_t n = 0; n < width; n += kPair) {
      const int64_t count = std::min(kPair, width - n);
      for (int64_t i = 0; i < behind; ++i) ask_for(w + later[i] * width + n, kPair, w + rows * width);
      const Pair before = load_pair(y + n, count);
      Pair sum = scale == nullptr ? before : Pair{Vec(0.f), Vec(0.f)};
      for (int64_t i = 0; i < here; ++i) {
        const Pair ws = load_pair(w + row[i] * width + n, count);
        for (int half = 0; half < 2; ++half) sum[half] = at::vec::fmadd(Vec(a[row[i]]), ws[half], sum[half]);
      }
      if (scale != nullptr) {
        const Pair scales = load_pair(scale + n, count);
        for (int half = 0; half < 2; ++half) sum[half] = at::vec::fmadd(sum[half], scales[half], before[half]);
      }
      store_pair(sum, y + n, count);
    }
    here = behind;
    std::copy_n(later, behind, row);
  }
}

// Weights of experts as they are, up and gate (E, s, d), down (E, s, d_out); where they are int8, also scales of up and
// gate (E, s), and down (E, d_out). What there is none of is null.
template <typename W>
struct FewTokensWeights {
  const W *up, *gate, *down;
  const float *up_scale, *gate_scale, *down_scale;
};

// Experts on the weights as they are, in bf16 or int8; tokens are not rounded.
template <typename W>
class FewTokensExperts {
 public:
  static constexpr int64_t kMinBlock = 32, kMaxBlock = kFewTokens;
  FewTokensExperts(const Problem& problem, const at::Tensor& x, const FewTokensWeights<W>& weights)
      : problem_(problem),
        weights_(weights),
        x_(x.numel()),
        hidden_(problem.neurons),
        gated_(weights.gate == nullptr ? 0 : problem.neurons) {
    if (x.scalar_type() == at::kFloat) {
      std::copy_n(x.const_data_ptr<float>(), x.numel(), x_.data());
    } else {
      at::vec::convert(x.const_data_ptr<at::BFloat16>(), x_.data(), x.numel());
    }
  }

  // y = start + the sum of expert(x[first + rows]) of a range of experts; `start` (d_out,), or null for zeros.
  void run(const Block& block, const float* start, float* y) {
    start_rows(start, block.tokens, problem_.outputs, y, problem_.outputs);
    block.each([&](int64_t e) { run(e, block.first, block.rows(e), block.count(e), y); });
  }

 private:
  void run(int64_t expert, int64_t first, const int32_t* rows, int64_t count, float* y) {
    const int64_t d = problem_.width, s = problem_.neurons, d_out = problem_.outputs, n = expert * s;
    const auto& w = weights_;
    for (int64_t i = 0; i < count; ++i) {
      const float* x = x_.data() + (first + rows[i]) * d;
      if (w.gate == nullptr) {
        dot_rows(x, d, w.up + n * d, at(w.up_scale, n), s, hidden_.data());
        activate(
            problem_.activation, hidden_.data(), at(problem_.up_bias, n), nullptr, nullptr, 1, s, s, problem_.cutoffs);
      } else {
        dot_rows(x, d, w.gate + n * d, at(w.gate_scale, n), s, gated_.data());
        activate(
            problem_.activation, gated_.data(), at(problem_.gate_bias, n), nullptr, nullptr, 1, s, s,
            {.hidden = problem_.cutoffs.gate});
        dot_rows<W>(x, d, w.up + n * d, at(w.up_scale, n), s, hidden_.data(), nullptr, gated_.data());
        multiply_gates(at(problem_.up_bias, n));
      }
      add_rows(hidden_.data(), s, w.down + n * d_out, at(w.down_scale, expert * d_out), d_out, y + rows[i] * d_out);
    }
  }

  // hidden_ becomes (hidden_ + bias) gated_, or 0 where that is too small, or gated_ is 0 and hidden_ was left as it was
  void multiply_gates(const float* bias) {
    for (size_t j = 0; j < hidden_.size(); ++j) {
      const float gate = gated_[j];
      const float value = gate == 0.f ? 0.f : (bias == nullptr ? hidden_[j] : hidden_[j] + bias[j]) * gate;
      hidden_[j] = std::abs(value) < problem_.cutoffs.hidden ? 0.f : value;
    }
  }

  Problem problem_;
  FewTokensWeights<W> weights_;
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
    dot_rows(row.data(), width, down, nullptr, rank, inner.data());
    inner[rank] = 1.f;
    for (float& each : inner) each *= shares[t];
    at::vec::convert(y + t * outputs, sum.data(), outputs);
    add_rows(inner.data(), rank + 1, up, nullptr, outputs, sum.data());
    at::vec::convert(sum.data(), y + t * outputs, outputs);
  }
}

} // namespace d2dmoe
