// The other way to run experts: all of them, by the products of a dense FFN, with zeros for what a mask leaves out; and
// which way is faster. Dense products of many tokens run several times as many operations a second as those of single
// experts, above all on AMX, so that where many experts are chosen, or they are small, it is faster to compute them all.
#pragma once

#include "activations.h"
#include "few_tokens.h"
#include "int8_products.h"
#include "problem.h"
#include "products.h"
#include "tile_unit.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <optional>
#include <vector>

namespace d2dmoe {

// Microseconds on one core, fitted to measurements of 11 to 21 shapes, 1 to 1,024 tokens and 5% to 100% of the experts: of
// Xeons with AMX (Sapphire Rapids for floats), and of one without, whose costs by AVX2 are that one's too. Only ratios
// matter, and they are alike for several threads.
struct Costs {
  double dense_call;     // to begin with dense products
  double dense_weight;   // to load a weight for a dense product
  double dense_product;  // a token times a neuron times a column of a matrix
  double dense_neuron;   // to round and mask an activation of a token
  double expert;         // to begin with an expert
  double expert_weight;  // to load a weight of it
  double pair;           // to begin with a token for an expert
  double pair_column;    // to gather and scatter a column of it
  double pair_in_memory; // in addition, where a block of outputs is larger than the cache
  double expert_product; // as `dense_product`
};

constexpr Costs kFewInBFloat16{50, 1.66e-4, 1.9e-6, 0.0, 0.1, 1e-4, 0.0, 0.0, 0.0, 3.6e-5};
constexpr Costs kInFloat{30, 2.84e-4, 9.9e-6, 0.0, 0.3, 2e-4, 0.0, 1.2e-4, 0.0, 1.38e-5};
#if defined(D2DMOE_TILES)
constexpr Costs kInBFloat16{50, 1.66e-4, 1.9e-6, 0.0, 1.2, 1e-4, 0.0, 1.0e-4, 1.6e-4, 2.9e-6};
constexpr Costs kInInt8{0, 3.9e-5, 8.3e-7, 4.6e-4, 0.05, 5.7e-5, 0.03, 1.4e-4, 0.0, 1.0e-6}; // of a later one
#else
constexpr Costs kInBFloat16 = kInFloat; // the units are those of fp32
#if defined(CPU_CAPABILITY_AVX512)
constexpr Costs kInInt8{11, 4.1e-5, 4.3e-6, 1.2e-3, 0.3, 6.4e-5, 0.052, 2.0e-4, 0.0, 5.0e-6};
#else
constexpr Costs kInInt8{10, 1.9e-5, 2.2e-5, 5e-3, 0.0, 1.0e-4, 0.31, 2.3e-4, 0.0, 3.1e-5};
#endif
#endif
constexpr Costs kInInt8OfFloats{21, 1.3e-5, 2.1e-5, 4.6e-3, 0.08, 1.7e-4, 0.01, 9.2e-5, 0.0, 4.4e-5}; // all at once in int8

// Of dense products: below that, the difference is some microseconds.
constexpr int64_t kFewProducts = int64_t(1) << 16;

inline bool dense_is_faster(const Problem& problem, bool is_gated, const Costs& costs) {
  const int64_t n = problem.tokens, experts = problem.experts;
  const double matrix = static_cast<double>(problem.neurons) * (problem.width * (is_gated ? 2 : 1) + problem.outputs);
  if (n * matrix * experts < kFewProducts) return false;
  std::vector<uint8_t> runs(experts, 0);
  int64_t pairs = 0;
  for (int64_t t = 0; t < n; ++t) { // by bytes, many at once
    const auto* row = reinterpret_cast<const uint8_t*>(problem.mask) + t * experts;
    for (int64_t e = 0; e < experts; ++e) runs[e] |= row[e], pairs += row[e];
  }
  const int64_t running = std::accumulate(runs.begin(), runs.end(), int64_t(0));
  const double neurons = static_cast<double>(experts) * problem.neurons * (is_gated ? 2 : 1);
  const double dense = costs.dense_call + experts * matrix * (costs.dense_weight + n * costs.dense_product) +
      n * neurons * costs.dense_neuron;
  const double columns = (problem.width + problem.outputs) / 2.0;
  const double moved = costs.pair_column + costs.pair_in_memory * std::min(1.0, n / 512.0);
  const double chosen = running * (costs.expert + matrix * costs.expert_weight) +
      pairs * (costs.pair + columns * moved + matrix * costs.expert_product);
  return dense < chosen;
}

// Zeros in a row of activations (E * s,) where a mask (E,) is not set.
inline void keep_chosen(const bool* mask, int64_t experts, int64_t s, float* row) {
  // by bits, since a product would let NaN through; no branch to mispredict
  const auto keep = [&](auto count) {
    for (int64_t e = 0; e < experts; ++e) {
      const uint32_t kept = mask[e] ? ~uint32_t(0) : 0;
      float* from = row + e * s;
      for (int64_t i = 0; i < count; ++i) from[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(from[i]) & kept);
    }
  };
  if (s > kWidth) return keep(s);
  with_rows<kWidth>(s, [&](auto count) { keep(count); }); // known to the compiler
}

// hidden (count, E * s) becomes act(gate) * hidden, or act(hidden), where the mask (count, E) is set, and 0 elsewhere.
// Rows of another type go through a buffer of floats, so that the functions are those of the other way.
template <typename T>
void activate_masked(const Problem& problem, const bool* mask, int64_t count, const T* gate, T* hidden) {
  constexpr bool kInPlace = std::is_same_v<T, float>;
  const int64_t experts = problem.experts, s = problem.neurons, size = experts * s;
  at::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> up(kInPlace ? 0 : size), gated(kInPlace || gate == nullptr ? 0 : size);
    for (int64_t t = begin; t < end; ++t) {
      T* row = hidden + t * size;
      float* wide;
      if constexpr (kInPlace) {
        wide = row;
      } else {
        wide = up.data();
        at::vec::convert(row, wide, size);
      }
      const float* factors = gate == nullptr ? nullptr : in_floats(gate + t * size, gated.data(), size);
      activate(problem.activation, wide, nullptr, factors, nullptr, 1, size, size, problem.cutoffs);
      keep_chosen(mask + t * experts, experts, s, wide);
      if constexpr (!kInPlace) at::vec::convert(wide, row, size);
    }
  });
}

// x (N, d); up and gate (E, s, d), biases (E, s); down (E, s, d_out), bias (d_out,), weights of the type of x: (N, d_out).
inline at::Tensor masked_dense(
    const Problem& problem, const at::Tensor& x, const at::Tensor& up, const std::optional<at::Tensor>& up_bias,
    const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& gate_bias, const at::Tensor& down,
    const std::optional<at::Tensor>& down_bias) {
  using Optional = std::optional<at::Tensor>;
  constexpr int64_t kTokens = 1024; // at once: what is between the products is to stay in the cache, and small
  const auto type = x.scalar_type();
  const auto in_type = [&](const Optional& bias) { return bias ? Optional(bias->flatten().to(type)) : Optional(); };
  const at::Tensor rows = up.flatten(0, 1), columns = down.flatten(0, 1); // (E * s, d), (E * s, d_out)
  const Optional gate_rows = gate ? Optional(gate->flatten(0, 1)) : Optional();
  const Optional first_bias = in_type(up_bias), second_bias = in_type(gate_bias), last_bias = in_type(down_bias);
  at::Tensor out = at::empty({problem.tokens, problem.outputs}, x.options());
  for (int64_t first = 0; first < problem.tokens; first += kTokens) {
    const int64_t count = std::min(kTokens, problem.tokens - first);
    const bool* mask = problem.mask + first * problem.experts;
    const at::Tensor tokens = x.narrow(0, first, count);
    const at::Tensor hidden = at::linear(tokens, rows, first_bias); // (count, E * s)
    const at::Tensor gated = gate_rows ? at::linear(tokens, *gate_rows, second_bias) : at::Tensor();
    if (type == at::kBFloat16) {
      using T = at::BFloat16;
      const T* from = gated.defined() ? gated.const_data_ptr<T>() : nullptr;
      activate_masked(problem, mask, count, from, hidden.mutable_data_ptr<T>());
    } else {
      const float* from = gated.defined() ? gated.const_data_ptr<float>() : nullptr;
      activate_masked(problem, mask, count, from, hidden.mutable_data_ptr<float>());
    }
    at::Tensor to = out.narrow(0, first, count);
    if (last_bias) {
      at::addmm_out(to, *last_bias, hidden, columns);
    } else {
      at::mm_out(to, hidden, columns);
    }
  }
  return out;
}

} // namespace d2dmoe
