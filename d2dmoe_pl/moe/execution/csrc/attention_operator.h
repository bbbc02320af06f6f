// Attention over sequences of any length, by what is fastest.
#pragma once

#include "attention.h"
#include "operands.h"
#include "tile_attention.h"
#include "word_attention.h"

namespace d2dmoe {

// Rows that start where pairs do.
inline at::Tensor with_dense_rows(const at::Tensor& x) {
  return x.stride(-1) == 1 && x.stride(-2) % 2 == 0 ? x : x.contiguous();
}

// (B, H, Lq, d) of queries over keys; what is not for the kernels of short sequences, ATen's own does. `rounds` allows
// for products of 16-bit integers, which are faster where there is VNNI and no matrix unit.
inline at::Tensor attention_cpu(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
    std::optional<double> scale, bool rounds) {
  const auto type = q.scalar_type();
  const int64_t d = q.size(-1);
  const bool is_plain = q.dim() == 4 && q.sizes().slice(0, 2) == k.sizes().slice(0, 2) && k.sizes() == v.sizes() &&
      k.size(3) == d && k.scalar_type() == type && v.scalar_type() == type && (!mask || mask->scalar_type() == type);
#if defined(D2DMOE_VNNI)
  const bool in_words = rounds && !kHasMatrixUnit && (type == at::kFloat || type == at::kBFloat16);
#else
  constexpr bool in_words = false;
#endif
  const bool is_known = in_words ||
      (type == at::kFloat && has_float_brgemm()) || (type == at::kBFloat16 && has_brgemm());
  // for few queries, as in writing, keys are not worth the packing
  const bool is_short = is_plain && k.size(2) > 0 && k.size(2) <= std::min(kLongest, 2 * q.size(2)) && d <= kWidestHead &&
      d % kTile == 0;
  if (!is_short || !is_known) {
    const at::Tensor out =
        std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0., /*is_causal=*/false, mask, scale));
    return out.transpose(1, 2).contiguous().transpose(1, 2); // as below, whatever it is
  }
  at::Tensor added;
  if (mask) added = with_dense_rows(mask->expand({q.size(0), q.size(1), q.size(2), k.size(2)}));
  const at::Tensor out = at::empty({q.size(0), q.size(2), q.size(1), d}, q.options());
  const float factor = scale ? static_cast<float>(*scale) : 1.f / std::sqrt(static_cast<float>(d));
  const auto* masked = mask ? &added : nullptr;
  const auto with = [&]<typename T>(T) {
#if defined(D2DMOE_VNNI)
    if (in_words) return attend<T, WordHead<T>>(with_dense_rows(q), with_dense_rows(k), with_dense_rows(v), masked, factor, out);
#endif
#if defined(D2DMOE_TILES)
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      if (TileHead::is_there()) {
        return attend<T, TileHead>(with_dense_rows(q), with_dense_rows(k), with_dense_rows(v), masked, factor, out);
      }
    }
#endif
    attend<T, BrgemmHead<T>>(with_dense_rows(q), with_dense_rows(k), with_dense_rows(v), masked, factor, out);
  };
  if (type == at::kFloat) {
    with(float());
  } else {
    with(at::BFloat16());
  }
  return out.transpose(1, 2);
}

} // namespace d2dmoe
