// Experts in int8: weights with a scale an output channel, tokens and activations with a scale each.
#pragma once

#include "hidden_rows.h"
#include "int8_avx2.h"
#include "int8_products.h"
#include "int8_vnni.h"
#include "lane_products.h"
#include "masked_dense.h"
#include "packed.h"
#include "panel_products.h"
#include "prefetch.h"
#include "problem.h"
#include "tiles.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <vector>

namespace d2dmoe {

// Tokens in uint8, with the scale of each. Behind them there is what products read beyond the last.
struct Int8Tokens {
  at::Tensor values, scale; // (N, d), (N,)
};

template <typename T>
Int8Tokens quantised_tokens(const at::Tensor& x) {
  const int64_t tokens = x.size(0), width = x.size(1);
  const at::Tensor longer = at::empty({(tokens + kBehind) * width + kLineBehind}, at::kByte);
  Int8Tokens made{longer.narrow(0, 0, tokens * width).view({tokens, width}), at::empty({tokens}, at::kFloat)};
  const T* in = x.const_data_ptr<T>();
  uint8_t* values = made.values.mutable_data_ptr<uint8_t>();
  float* scale = made.scale.mutable_data_ptr<float>();
  at::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> row(width);
    for (int64_t t = begin; t < end; ++t) {
      const float* wide = in_floats(in + t * width, row.data(), width);
      scale[t] = quantise(wide, width, /*from_zero=*/false, values + t * width);
    }
  });
  return made;
}

constexpr int64_t kManyTokens = kHasMatrixUnit ? 8 : 16; // from which on tiles of a matrix unit are worth their setting up

#if defined(D2DMOE_INT8)

// h (count, neurons) = x[rows] w^T in fp32; x (N, width)
inline void int8_dot_product(
    const uint8_t* x, int64_t width, const float* x_scale, const int32_t* rows, int64_t count, const Int8Rows& w,
    int64_t neurons, float* h, int64_t ld) {
  for (int64_t m = 0; m < count; m += kInt8DotRows) {
    with_rows<kInt8DotRows>(std::min<int64_t>(kInt8DotRows, count - m), [&](auto M) {
      for (int64_t n = 0; n < neurons; n += kNeurons) {
        const Int8Rows part{w.weight + n * width, w.scale + n, w.sum + n};
        const int four = static_cast<int>(std::min<int64_t>(kNeurons, neurons - n));
        int8_dot_tile<M>(x, width, x_scale, rows + m, part, four, h + m * ld + n, ld);
      }
    });
  }
}

// What is read of weights (E, s, d) whose output channels are their rows.
struct Int8Up {
  const int8_t* weight;
  const float* scale;  // (E, s)
  const int32_t* sums; // (E, s), of `row_sums`

  Int8Rows rows(int64_t row, int64_t width) const { return {weight + row * width, scale + row, sums + row}; }
};

class Int8Experts {
 public:
  static constexpr int64_t kMinBlock = 32; // tokens a thread, below which experts are dealt out to threads as well
  static constexpr int64_t kMaxBlock = 512; // tokens of a task

  // `down` in quads, whose output channels are its columns: scale (E, d_out); sums (E, chunks, d_out), of `chunk_sums`.
  // `up_quads` and `gate_quads`, transposed, are for many tokens at once; null where they are not multiplied.
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

  // y = start + the sum of expert(x[first + rows]) of a range of experts; `start` (d_out,), or null for zeros.
  void run(const Block& block, const float* start, float* y) {
    narrow_.run(
        block, start, problem_.outputs, y, [&](int64_t expert) { first_products(expert, block); },
        [&] { second_products(); });
  }

 private:
  static constexpr int64_t kTokensAtOnce = 96;
  static constexpr int64_t kSomeTokens = 8; // from which on tiles are worth it in second products
  static constexpr int64_t kSomeInLanes = 4; // from which on lanes are in first ones

  int64_t hidden_ld() const { return quads(std::min(problem_.neurons, kChunk)) * 4; }
  bool from_zero() const { return problem_.activation == Activation::relu && gate_.weight == nullptr; }

  // narrow_ and scales_ get those of one expert
  void first_products(int64_t expert, const Block& block) {
    const int64_t d = problem_.width, s = problem_.neurons, step = std::min(s, kChunk), ld = hidden_ld();
    const uint8_t* x = x_ + block.first * d;
    const float* x_scale = x_scale_ + block.first;
    const int64_t all = block.count(expert);
    grow(hidden_, std::min(all, kTokensAtOnce) * step);
    if (gate_.weight != nullptr) grow(gated_, std::min(all, kTokensAtOnce) * step);
    for (int64_t m = 0; m < all; m += kTokensAtOnce) {
      const int64_t tokens = std::min(kTokensAtOnce, all - m);
      const int32_t* rows = block.rows(expert) + m;
      const bool in_tiles = tokens >= (in_lanes() ? kSomeInLanes : kManyTokens) && up_quads_ != nullptr;
      if (in_tiles && !in_lanes()) {
        const int64_t ld = PanelProducts::apart(d);
        grow(tokens_, (tokens + kBehind) * ld);
        gather_rows(x, d, rows, tokens, ld, tokens_.data());
      }
      const auto product = [&](const Int8Up& up, const int8_t* packed, int64_t n, int64_t neurons, float* out) {
        if (in_tiles && in_lanes()) {
          lanes_of(expert, n, neurons, up, packed, x, x_scale, rows, tokens, out, step);
        } else if (in_tiles) {
          tile_product(expert, n, neurons, up, packed, x_scale, rows, tokens, out, step);
        } else {
          int8_dot_product(x, d, x_scale, rows, tokens, up.rows(expert * s + n, d), neurons, out, step);
        }
      };
      for (int64_t n = 0; n < s; n += kChunk) {
        const int64_t neurons = std::min(kChunk, s - n), row = expert * s + n;
        product(up_, up_quads_, n, neurons, hidden_.data());
        if (gate_.weight != nullptr) product(gate_, gate_quads_, n, neurons, gated_.data());
        activate(
            problem_.activation, hidden_.data(), at(problem_.up_bias, row),
            gate_.weight == nullptr ? nullptr : gated_.data(), at(problem_.gate_bias, row), tokens, neurons, step,
            problem_.cutoffs);
        uint8_t* narrow = narrow_.add(expert, n / kChunk, rows, tokens, ld);
        grow(scales_, narrow_.filled());
        float* scales = scales_.data() + narrow_.filled() - tokens;
        for (int64_t i = 0; i < tokens; ++i) {
          scales[i] = quantise(hidden_.data() + i * step, neurons, from_zero(), narrow + i * ld);
          std::fill(narrow + i * ld + neurons, narrow + (i + 1) * ld, uint8_t(0));
        }
      }
    }
  }

  void second_products() {
    unit_.release();
    products_.release();
    const Tiles tiles(quads(std::min(problem_.neurons, kChunk)));
    const auto add = [&](const Part& part, const Part* next, int64_t first, int64_t columns, float* to, int64_t ld) {
      if (next != nullptr) ask_for_down(*next, first, columns);
      second_product(tiles, part, first, columns, to, ld);
    };
    narrow_.add_outputs<Tiles::kColumns>(add);
  }

  int64_t depth_of(const Part& part) const {
    return quads(std::min(kChunk, problem_.neurons - part.chunk * kChunk));
  }

  const int8_t* down_of(const Part& part) const {
    return down_ + (part.expert * quads(problem_.neurons) + part.chunk * kChunk / 4) * problem_.outputs * 4;
  }

  // Lets the cache know of the weights that come next, which lie too far apart for it to see.
  void ask_for_down(const Part& part, int64_t first, int64_t columns) const {
    const int64_t ld = problem_.outputs * 4;
    const int8_t* down = down_of(part) + first * 4;
    for (int64_t k = 0; k < depth_of(part); ++k) ask_for(down + k * ld, columns * 4, down + k * ld + columns * 4);
    asm volatile(""); // an effect, without which GCC leaves out the call
  }

  // y[rows] += the columns from `first` on of what a part gives
  void second_product(
      const Tiles& tiles, const Part& part, int64_t first, int64_t columns, float* y, int64_t y_ld) const {
    const int64_t outputs = problem_.outputs, s = problem_.neurons, ld = hidden_ld();
    const int64_t chunks = (s + kChunk - 1) / kChunk, depth = depth_of(part);
    const uint8_t* h = narrow_.of(part);
    const float* h_scale = scales_.data() + part.first;
    const int8_t* down = down_of(part);
    const float* scale = down_scale_ + part.expert * outputs;
    const int32_t* sums = down_sums_ + (part.expert * chunks + part.chunk) * outputs;
    int64_t n = first; // by tiles up to here
    if (part.count >= kSomeTokens && tiles.fit(depth)) {
      for (; n + Tiles::kColumns <= first + columns; n += Tiles::kColumns) {
        tiles.add_int8(
            h, ld, h_scale, from_zero(), down + n * 4, outputs, scale + n, sums + n, y + n - first, y_ld, part.rows,
            part.count);
      }
    }
    int8_add_product(
        h, ld, depth, h_scale, from_zero(), down + n * 4, outputs, first + columns - n, scale + n, sums + n,
        y + n - first, y_ld, part.rows, part.count);
  }

  // Whether rows are read where they are: a matrix unit would have them side by side.
  bool in_lanes() const {
#if defined(D2DMOE_VNNI)
    return !kHasMatrixUnit && problem_.neurons >= kWidth && problem_.width % 4 == 0;
#else
    return false;
#endif
  }

  // out (count, neurons) of x[rows], from neuron n of the expert on
  void lanes_of(
      int64_t expert, int64_t n, int64_t neurons, const Int8Up& up, const int8_t* packed, const uint8_t* x,
      const float* x_scale, const int32_t* rows, int64_t count, float* out, int64_t ld) const {
#if defined(D2DMOE_VNNI)
    const int64_t s = problem_.neurons, depth = problem_.width / 4, row = expert * s + n;
    const auto* tokens = reinterpret_cast<const int32_t*>(x);
    const auto* w = reinterpret_cast<const int32_t*>(packed) + expert * depth * s + n;
    picked_lane_product<OfBytes>(
        tokens, depth, rows, count, depth, w, s, neurons,
        [&](int64_t m, int64_t i, Whole sums) {
          const int64_t some = std::min(kWidth, neurons - i);
          dequantised(sums, up.sums + row + i, up.scale + row + i, x_scale[rows[m]], some).store(out + m * ld + i, some);
        });
#endif
  }

  // out (count, neurons) of tokens_, from neuron n of the expert on
  void tile_product(
      int64_t expert, int64_t n, int64_t neurons, const Int8Up& up, const int8_t* packed, const float* x_scale,
      const int32_t* rows, int64_t count, float* out, int64_t ld) {
    const int64_t depth = panel_depth(problem_.width), apart = PanelProducts::apart(problem_.width);
    const int64_t first = expert * problem_.neurons + n;
    const auto give = [&](int64_t i, int64_t at, Whole sums) {
      const int64_t some = std::min(kWidth, neurons - at), row = first + at;
      if (some <= 0) return;
      dequantised(sums, up.sums + row, up.scale + row, x_scale[rows[i]], some).store(out + i * ld + at, some);
    };
    if constexpr (kHasMatrixUnit) {
      const int8_t* panels = packed + (expert * whole_panels(problem_.neurons) + n) * depth;
      products_.take(tokens_.data(), count, apart, problem_.width);
      for (int64_t at = 0; at < neurons; at += PanelProducts::kColumns) {
        const int64_t here = whole_panels(std::min(PanelProducts::kColumns, neurons - at));
        products_.multiply(panels + at * depth, here, [&](int64_t i, int64_t j, Whole sums) { give(i, at + j, sums); });
      }
      return;
    }
    const int64_t s = problem_.neurons, height = rounded_height(count);
    const int8_t* w = packed + (expert * depth * s + n * 4);
    grow(whole_, height * neurons);
#if defined(D2DMOE_VNNI)
    unit_.held = true;
    at::native::cpublas::brgemm(
        height, neurons, depth, apart, s, neurons, /*add_C=*/false, tokens_.data(), w, whole_.data());
#else
    quad_product(tokens_.data(), count, depth / 4, w, s, neurons, whole_.data());
#endif
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t at = 0; at < neurons; at += kWidth) {
        give(i, at, Whole::loadu(whole_.data() + i * neurons + at, std::min(kWidth, neurons - at)));
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
  PanelProducts products_;
  HeldUnit unit_;
  HiddenRows<uint8_t> narrow_;        // (rows, hidden_ld())
  std::vector<float> scales_;         // of each of them
  std::vector<float> hidden_, gated_; // (kTokensAtOnce, step)
  std::vector<uint8_t> tokens_;       // (kTokensAtOnce, `PanelProducts::apart`)
  std::vector<int32_t> whole_;        // sums of products in int8
};

#endif

} // namespace d2dmoe
