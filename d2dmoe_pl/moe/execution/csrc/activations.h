// The activation functions of moe/experts/activation_kinds.py, on vectors of floats.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <string>

namespace d2dmoe {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kWidth = Vec::size();

// The largest of a vector's numbers; NaN where one is.
inline float largest_lane(Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 lanes = v;
  if (_mm512_cmp_ps_mask(lanes, lanes, _CMP_UNORD_Q) != 0) return std::numeric_limits<float>::quiet_NaN();
  return _mm512_reduce_max_ps(lanes);
#else
  float lanes[kWidth];
  v.store(lanes);
  float most = lanes[0];
  for (const float lane : lanes) most = lane > most || std::isnan(lane) ? lane : most;
  return most;
#endif
}

enum class Activation { relu, gelu, gelu_tanh, silu, tanh };

inline Activation activation_named(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  if (name == "tanh") return Activation::tanh;
  TORCH_CHECK_VALUE(false, "activation='", name, "': allowed are relu, gelu, gelu_tanh, silu, tanh");
}

inline Vec relu(Vec x) {
  return at::vec::clamp_min(x, Vec(0.f)); // NaN stays NaN
}

inline Vec gelu(Vec x) {
  return x * Vec(0.5f) * (Vec(1.f) + (x * Vec(0.70710678f)).erf());
}

inline Vec gelu_tanh(Vec x) {
  const Vec inner = Vec(0.79788456f) * (x + Vec(0.044715f) * x * x * x);
  return x * Vec(0.5f) * (Vec(1.f) + inner.tanh());
}

inline Vec silu(Vec x) {
  return x / (Vec(1.f) + x.neg().exp());
}

inline Vec tanh(Vec x) {
  return x.tanh();
}

// Magnitudes below which an activation is 0, or what the activation function gives for a gate; 0 for none.
struct Cutoffs {
  float hidden = 0.f, gate = 0.f;
};

inline Vec cut_below(Vec value, float cutoff) {
  return cutoff > 0.f ? Vec::blendv(value, Vec(0.f), value.abs() < Vec(cutoff)) : value;
}

// hidden (rows, neurons) becomes act(hidden + bias), or act(gate + gate_bias) * (hidden + bias) if there is a gate.
// Biases may be null; both matrices have rows `ld` apart. What is too small by `cutoffs` becomes 0; NaN stays NaN.
template <Vec (*act)(Vec)>
void activate(
    float* hidden, const float* bias, const float* gate, const float* gate_bias, int64_t rows, int64_t neurons,
    int64_t ld, Cutoffs cutoffs) {
  const auto biased = [](const float* values, const float* bias, int64_t n, int64_t count) {
    const Vec value = Vec::loadu(values + n, count);
    return bias == nullptr ? value : value + Vec::loadu(bias + n, count);
  };
  for (int64_t m = 0; m < rows; ++m) {
    float* row = hidden + m * ld;
    for (int64_t n = 0; n < neurons; n += kWidth) {
      const int64_t count = std::min(kWidth, neurons - n);
      const Vec up = biased(row, bias, n, count);
      const Vec value =
          gate == nullptr ? act(up) : cut_below(act(biased(gate + m * ld, gate_bias, n, count)), cutoffs.gate) * up;
      cut_below(value, cutoffs.hidden).store(row + n, count);
    }
  }
}

inline void activate(
    Activation kind, float* hidden, const float* bias, const float* gate, const float* gate_bias, int64_t rows,
    int64_t neurons, int64_t ld, Cutoffs cutoffs = {}) {
  switch (kind) {
    case Activation::relu:
      return activate<relu>(hidden, bias, gate, gate_bias, rows, neurons, ld, cutoffs);
    case Activation::gelu:
      return activate<gelu>(hidden, bias, gate, gate_bias, rows, neurons, ld, cutoffs);
    case Activation::gelu_tanh:
      return activate<gelu_tanh>(hidden, bias, gate, gate_bias, rows, neurons, ld, cutoffs);
    case Activation::silu:
      return activate<silu>(hidden, bias, gate, gate_bias, rows, neurons, ld, cutoffs);
    case Activation::tanh:
      return activate<tanh>(hidden, bias, gate, gate_bias, rows, neurons, ld, cutoffs);
  }
}

} // namespace d2dmoe
