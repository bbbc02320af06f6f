// Self-attention whose queries, keys and values come of linear layers in int8: sample by sample, or head by head, so that
// none of them leaves a core's cache. By a matrix unit, or VNNI; where there is neither, or the sequences are long, one step
// after the other.
#pragma once

#include "attention_operator.h"
#include "int8_experts.h"
#include "int8_linear_operator.h"
#include "lane_products.h"
#include "word_attention.h"

#include <memory>

namespace d2dmoe {

#if defined(D2DMOE_VNNI)
// A way to compute queries, keys and values of some heads, and their attention.
class ByLanes {
 public:
  using Part = float;
  using Head = WordHead<float>;

  static bool is_there() { return !kHasMatrixUnit; }

  // How many heads, side by side, are computed at once: as many as fill two panels.
  static int64_t heads_at_once(int64_t batch, int64_t heads, int64_t d) {
    const int64_t some = std::max<int64_t>(1, 2 * kPanel / d);
    return heads % some == 0 && batch * heads / some >= at::get_num_threads() ? some : 1;
  }

  // out (rows, columns) = x (rows, depth) w^T + bias of rows in uint8, from a column of the layer's on; `depth` is a
  // multiple of 4.
  void multiply(
      const uint8_t* x, int64_t depth, const float* x_scale, int64_t rows, const Int8Linear<Part>& of, int64_t from,
      int64_t columns) const {
    const auto* lanes = reinterpret_cast<const int32_t*>(x);
    const auto* panels = reinterpret_cast<const int32_t*>(of.w);
    const int64_t ld = depth / 4;
    for (int64_t n = 0; n < columns;) {
      const int64_t at = from + n, inside = at % kPanel, count = std::min(kPanel - inside, columns - n);
      lane_product<OfBytes>(
          lanes, ld, rows, ld, panels + (at - inside) * ld + inside, kPanel, count,
          [&](int64_t m, int64_t i, Whole sums) {
            const Vec value = dequantised(sums, of.less + at + i, of.scale + at + i, x_scale[m]);
            const Vec biased = of.bias == nullptr ? value : value + Vec::loadu(of.bias + at + i);
            biased.store(of.out + m * columns + n + i);
          });
      n += count;
    }
  }
};

#if defined(D2DMOE_TILES)
class ByTiles {
 public:
  using Part = at::BFloat16;
  using Head = TileHead;

  static bool is_there() { return TileHead::is_there(); }

  // All, so that weights are read once a sample, but for threads that would have none.
  static int64_t heads_at_once(int64_t batch, int64_t heads, int64_t) {
    int64_t some = heads;
    while (some > 1 && (heads % some != 0 || batch * heads / some < at::get_num_threads())) --some;
    return some;
  }

  void multiply(
      const uint8_t* x, int64_t depth, const float* x_scale, int64_t rows, const Int8Linear<Part>& of, int64_t from,
      int64_t columns) {
    products_.take(x, rows, depth, depth);
    Int8Linear<Part> part = of;
    part.w += from * panel_depth(depth), part.scale += from, part.less += from, part.columns = columns;
    if (part.bias != nullptr) part.bias += from;
    for (int64_t n = 0; n < columns; n += PanelProducts::kColumns) {
      const PanelOutputs<Part> outputs{part, n, 0, columns, x_scale};
      products_.multiply(part.w + n * panel_depth(depth), whole_panels(outputs.columns), outputs);
    }
  }

 private:
  PanelProducts products_; // holds the unit as heads do, so that neither releases it before the other is done
};
#endif

// out (B, L, H, d) of x (B, L, D), by the linear layers that give queries, keys and values: one for each, or one for all.
template <typename T, typename Way>
void self_attend(
    const at::Tensor& x, std::vector<Int8Linear<typename Way::Part>> linears, int64_t heads, int64_t d,
    const at::Tensor* mask, float scale, const at::Tensor& out) {
  using Part = typename Way::Part;
  using Head = typename Way::Head;
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  T* to = out.mutable_data_ptr<T>();
  const Int8Tokens tokens = quantised_tokens<T>(x.view({batch * length, width}));
  const uint8_t* q = tokens.values.const_data_ptr<uint8_t>();
  const float* scales = tokens.scale.const_data_ptr<float>();
  const int64_t group = Way::heads_at_once(batch, heads, d), groups = heads / group, wide = group * d;
  at::parallel_for(0, batch * groups, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t kQueries = Head::kQueries;
    Way way;
    Head head(length, std::min(kQueries, length), d);
    Mask<T> added(mask, length, length, in_tiles(length));
    std::unique_ptr<Part[]> parts[3]; // (length, wide), which a vector would fill with zeros
    std::vector<float> y(std::is_same_v<T, float> ? 0 : kQueries * d);
    for (auto& part : parts) part = std::make_unique_for_overwrite<Part[]>(length * wide);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups, first_head = task % groups * group, apart = heads * d;
      added.go_to(b, first_head);
      const int64_t seen = mask == nullptr || mask->stride(1) == 0 ? added.seen() : length; // by any of the heads
      for (int64_t part = 0; part < 3; ++part) {
        const bool is_one = linears.size() == 1;
        Int8Linear<Part> linear = linears[is_one ? 0 : part];
        linear.out = parts[part].get();
        way.multiply(
            q + b * length * width, width, scales + b * length, part == 0 ? length : seen, linear,
            ((is_one ? part * heads : 0) + first_head) * d, wide);
      }
      for (int64_t i = 0; i < group; ++i) {
        const int64_t h = first_head + i;
        added.go_to(b, h);
        const int64_t keys = added.seen();
        T* rows = to + (b * length * heads + h) * d;
        if (keys == 0) {
          for (int64_t m = 0; m < length; ++m) std::fill_n(rows + m * apart, d, T(0.f));
          continue;
        }
        head.take(parts[1].get() + i * d, wide, parts[2].get() + i * d, wide, keys);
        for (int64_t first = 0; first < length; first += kQueries) {
          const int64_t count = std::min(kQueries, length - first);
          const Part* queries = parts[0].get() + first * wide + i * d;
          if constexpr (std::is_same_v<T, float>) {
            head.attend(queries, wide, count, added, first, scale, rows + first * apart, apart);
          } else {
            head.attend(queries, wide, count, added, first, scale, y.data(), d);
            for (int64_t m = 0; m < count; ++m) at::vec::convert(y.data() + m * d, rows + (first + m) * apart, d);
          }
        }
      }
    }
  });
}

// The same, given weight, scale and bias of these layers, all of as many outputs.
template <typename Way>
at::Tensor self_attention(
    const at::Tensor& x, at::TensorList weights, at::TensorList scales, const Optionals& biases, int64_t heads, int64_t d,
    const std::optional<at::Tensor>& mask, float scale) {
  const int64_t batch = x.size(0), length = x.size(1);
  std::vector<at::Tensor> kept; // what is read below
  std::vector<Int8Linear<typename Way::Part>> linears;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_linear(x.size(2), weights[i], scales[i], biases[i]);
    const int64_t columns = weights[i].size(0);
    TORCH_CHECK_VALUE(columns == weights[0].size(0), "linear layers must have as many outputs each");
    const at::Tensor panels = packed_weights().get(weights[i], Form::panels), factors = in_fp32(scales[i]);
    const at::Tensor sums = packed_weights().get(weights[i], Form::row_sums), added = in_fp32(biases[i]);
    linears.push_back(
        {panels.const_data_ptr<int8_t>(), floats(factors), sums.const_data_ptr<int32_t>(), floats(added), columns,
         nullptr});
    kept.insert(kept.end(), {panels, factors, sums, added});
  }
  at::Tensor masks;
  if (mask) masks = with_dense_rows(mask->expand({batch, heads, length, length}));
  const at::Tensor out = at::empty({batch, length, heads, d}, x.options());
  const auto* masked = mask ? &masks : nullptr;
  if (x.scalar_type() == at::kFloat) {
    self_attend<float, Way>(x.contiguous(), linears, heads, d, masked, scale, out);
  } else {
    self_attend<at::BFloat16, Way>(x.contiguous(), linears, heads, d, masked, scale, out);
  }
  return out.transpose(1, 2);
}
#endif

// (B, H, L, d) of x (B, L, D), given weight, scale and bias of the linear layers that give queries, keys and values, side
// by side: one for each, or one for all.
inline at::Tensor int8_self_attention_cpu(
    const at::Tensor& x, at::TensorList weights, at::TensorList scales, const Optionals& biases, int64_t heads,
    const std::optional<at::Tensor>& mask, std::optional<double> scale) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x has shape ", x.sizes(), ", not (B, L, D)");
  TORCH_CHECK_VALUE(weights.size() == 1 || weights.size() == 3, "there must be one linear layer, or three");
  TORCH_CHECK_VALUE(scales.size() == weights.size() && biases.size() == weights.size(), "one scale and bias a weight");
  TORCH_CHECK_VALUE(heads > 0, "heads=", heads, ": must be positive");
  const int64_t batch = x.size(0), length = x.size(1), outputs = 3 / static_cast<int64_t>(weights.size());
  TORCH_CHECK_VALUE(weights[0].size(0) % (outputs * heads) == 0, "heads=", heads, ": must part the outputs");
  const int64_t d = weights[0].size(0) / outputs / heads;
#if defined(D2DMOE_VNNI)
  const auto type = x.scalar_type();
  const bool is_known = (type == at::kFloat || type == at::kBFloat16) && (!mask || mask->scalar_type() == type);
  const bool is_short = length > 0 && length <= kLongest && d <= kWidestHead && d % kTile == 0;
  if (is_known && is_short && x.size(2) % 4 == 0) {
    const float factor = scale ? static_cast<float>(*scale) : 1.f / std::sqrt(static_cast<float>(d));
    const auto by = [&]<typename Way>(Way) {
      return self_attention<Way>(x, weights, scales, biases, heads, d, mask, factor);
    };
    if (ByLanes::is_there()) return by(ByLanes());
#if defined(D2DMOE_TILES)
    if (ByTiles::is_there()) return by(ByTiles());
#endif
  }
#endif
  const at::Tensor rows = int8_linears_cpu(x.reshape({batch * length, x.size(2)}), weights, scales, biases);
  const auto parts = rows.view({batch, length, 3, heads, d}).permute({2, 0, 3, 1, 4}).unbind(); // (B, H, L, d) each
  return attention_cpu(parts[0], parts[1], parts[2], mask, scale, /*rounds=*/true);
}

} // namespace d2dmoe
