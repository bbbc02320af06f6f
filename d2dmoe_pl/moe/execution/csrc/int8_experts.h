// Experts in int8: weights with a scale an output channel, tokens and activations with a scale each.
#pragma once

#include "int8_products.h"
#include "packed.h"
#include "problem.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <vector>

namespace d2dmoe {

// Tokens in uint8, with the scale of each.
struct Int8Tokens {
  at::Tensor values, scale; // (N, d), (N,)
};

template <typename T>
Int8Tokens quantised_tokens(const at::Tensor& x) {
  const int64_t tokens = x.size(0), width = x.size(1);
  Int8Tokens made{at::empty({tokens, width}, at::kByte), at::empty({tokens}, at::kFloat)};
  const T* in = x.const_data_ptr<T>();
  uint8_t* values = made.values.mutable_data_ptr<uint8_t>();
  float* scale = made.scale.mutable_data_ptr<float>();
  at::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> row(width);
    for (int64_t t = begin; t < end; ++t) {
      at::vec::convert(in + t * width, row.data(), width);
      scale[t] = quantise(row.data(), width, /*from_zero=*/false, values + t * width);
    }
  });
  return made;
}

#if defined(D2DMOE_VNNI)

// What is read of weights (E, s, d) whose output channels are their rows.
struct Int8Up {
  const int8_t* weight;
  const float* scale;  // (E, s)
  const int32_t* sums; // (E, s), of `row_sums`

  Int8Rows rows(int64_t row, int64_t width) const { return {weight + row * width, scale + row, sums + row}; }
};

class Int8Experts {
 public:
  static constexpr int64_t kMaxBlock = 512; // tokens of a task

  // `down` in quads, whose output channels are its columns: scale (E, d_out); sums (E, chunks, d_out), of `chunk_sums`.
  // `up_quads` and `gate_quads`, transposed, are for many tokens at once; null where there is no brgemm.
  Int8Experts(
      const Problem& problem, const Int8Tokens& x, const Int8Up& up, const Int8Up& gate, const int8_t* down,
      const float* down_scale, const int32_t* down_sums, const int8_t* up_quads, const int8_t* gate_quads)
      : problem_(problem),
        x_(x.values.const_data_ptr<uint8_t>()),
        x_scale_(x.scale.const_data_ptr<float>()),
        up_(up),
        gate_(gate),
        down_(down),
        down_scale_(down_scale),
        down_sums_(down_sums),
        up_quads_(up_quads),
        gate_quads_(gate_quads) {}

  ~Int8Experts() {
    if (used_) at::native::cpublas::brgemm_release();
  }

  // y[rows] += expert(x[first + rows]), without the output bias.
  void run(int64_t expert, int64_t first, const int32_t* rows, int64_t count, float* y) {
    const int64_t d = problem_.width, s = problem_.neurons, outputs = problem_.outputs;
    const int64_t chunks = (s + kChunk - 1) / kChunk, step = std::min(s, kChunk), ld = quads(step) * 4;
    const int64_t height = std::min(count, kTokensAtOnce);
    const bool from_zero = problem_.activation == Activation::relu && gate_.weight == nullptr;
    const uint8_t* x = x_ + first * d;
    const float* x_scale = x_scale_ + first;
    grow(hidden_, height * step);
    if (gate_.weight != nullptr) grow(gated_, height * step);
    grow(narrow_, rounded_height(height) * ld);
    grow(scales_, height);
    for (int64_t m = 0; m < count; m += kTokensAtOnce) {
      const int64_t tokens = std::min(kTokensAtOnce, count - m);
      const bool in_tiles = tokens >= kManyTokens && up_quads_ != nullptr;
      if (in_tiles) gather(x, rows + m, tokens);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t n = chunk * kChunk, neurons = std::min(kChunk, s - n), row = expert * s + n;
        if (in_tiles) {
          first_product(expert, n, neurons, up_, up_quads_, x_scale, rows + m, tokens, hidden_.data(), step);
        } else {
          int8_dot_product(x, d, x_scale, rows + m, tokens, up_.rows(row, d), neurons, hidden_.data(), step);
        }
        if (gate_.weight != nullptr && in_tiles) {
          first_product(expert, n, neurons, gate_, gate_quads_, x_scale, rows + m, tokens, gated_.data(), step);
        } else if (gate_.weight != nullptr) {
          int8_dot_product(x, d, x_scale, rows + m, tokens, gate_.rows(row, d), neurons, gated_.data(), step);
        }
        activate(
            problem_.activation, hidden_.data(), at(problem_.up_bias, row),
            gate_.weight == nullptr ? nullptr : gated_.data(), at(problem_.gate_bias, row), tokens, neurons, step);
        for (int64_t i = 0; i < tokens; ++i) {
          scales_[i] = quantise(hidden_.data() + i * step, neurons, from_zero, narrow_.data() + i * ld);
          std::fill(narrow_.data() + i * ld + neurons, narrow_.data() + (i + 1) * ld, uint8_t(0));
        }
        const int8_t* down = down_ + (expert * quads(s) + n / 4) * outputs * 4;
        const float* scale = down_scale_ + expert * outputs;
        const int32_t* sums = down_sums_ + (expert * chunks + chunk) * outputs;
        if (in_tiles) {
          second_product(down, quads(neurons) * 4, ld, scale, from_zero ? nullptr : sums, rows + m, tokens, y);
        } else {
          int8_add_product(
              narrow_.data(), ld, quads(neurons), scales_.data(), from_zero, down, outputs, scale, sums, y, rows + m,
              tokens);
        }
      }
    }
  }

 private:
  static constexpr int64_t kTokensAtOnce = 96;
  static constexpr int64_t kManyTokens = 16; // from which on tiles of a matrix unit are worth their setting up
  static constexpr int64_t kColumnsAtOnce = 256;

  // tokens_ (count, 4 * quads(d)): rows of x, with zeros behind
  void gather(const uint8_t* x, const int32_t* rows, int64_t count) {
    const int64_t d = problem_.width, depth = quads(d) * 4;
    grow(tokens_, rounded_height(count) * depth);
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(x + rows[i] * d, d, tokens_.data() + i * depth);
      std::fill(tokens_.data() + i * depth + d, tokens_.data() + (i + 1) * depth, uint8_t(0));
    }
  }

  // out (count, neurons) of tokens_, from neuron n of the expert on
  void first_product(
      int64_t expert, int64_t n, int64_t neurons, const Int8Up& up, const int8_t* packed, const float* x_scale,
      const int32_t* rows, int64_t count, float* out, int64_t ld) {
    used_ = true;
    const int64_t s = problem_.neurons, depth = quads(problem_.width) * 4, height = rounded_height(count);
    grow(whole_, height * std::max(neurons, kColumnsAtOnce));
    at::native::cpublas::brgemm(
        height, neurons, depth, depth, s, neurons, /*add_C=*/false, tokens_.data(), packed + (expert * depth * s + n * 4),
        whole_.data());
    for (int64_t i = 0; i < count; ++i) {
      dequantise<float>(
          whole_.data() + i * neurons, up.sums + expert * s + n, up.scale + expert * s + n, x_scale[rows[i]], nullptr,
          neurons, out + i * ld);
    }
  }

  // y[rows] += narrow_ (count, depth) times a chunk of `down`
  void second_product(
      const int8_t* down, int64_t depth, int64_t ld, const float* scale, const int32_t* sums, const int32_t* rows,
      int64_t count, float* y) {
    const int64_t outputs = problem_.outputs, height = rounded_height(count);
    for (int64_t n = 0; n < outputs; n += kColumnsAtOnce) {
      const int64_t columns = std::min(kColumnsAtOnce, outputs - n);
      at::native::cpublas::brgemm(
          height, columns, depth, ld, outputs, columns, /*add_C=*/false, narrow_.data(), down + n * 4, whole_.data());
      for (int64_t i = 0; i < count; ++i) {
        dequantise_add(
            whole_.data() + i * columns, sums == nullptr ? nullptr : sums + n, scale + n, scales_[i], columns,
            y + rows[i] * outputs + n);
      }
    }
  }

  Problem problem_;
  const uint8_t* x_;
  const float* x_scale_;
  Int8Up up_, gate_;
  const int8_t* down_;
  const float* down_scale_;
  const int32_t* down_sums_;
  const int8_t *up_quads_, *gate_quads_;
  bool used_ = false;
  std::vector<float> hidden_, gated_, scales_; // (kTokensAtOnce, step), the same, (kTokensAtOnce,)
  std::vector<uint8_t> narrow_, tokens_;       // (kTokensAtOnce, ld), (kTokensAtOnce, depth)
  std::vector<int32_t> whole_;                 // sums of products in int8
};

#endif

} // namespace d2dmoe
