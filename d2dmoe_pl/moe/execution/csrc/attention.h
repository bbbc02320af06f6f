// Attention over short sequences, head by head, on copies of its queries, keys and values that fit a core's cache and
// are as ATen's brgemm takes them. ATen's own attention calls its products for more than they take.
#pragma once

#include "activations.h"
#include "packed.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

namespace d2dmoe {

constexpr int64_t kLongest = 256; // keys; beyond it, ATen is as fast
constexpr int64_t kWidestHead = 256;
constexpr int64_t kTile = 16; // keys and the width of heads are multiples of it
constexpr int64_t kQueries = 64; // at once

// scores (padded,) of one query become exp(scale scores + mask - the largest) in `out`; their sum is returned, 0 where
// the mask leaves no key. `padded` is a multiple of kTile.
template <typename T>
float softmax_row(float* scores, const float* mask, float scale, int64_t padded, T* out) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  Vec largest(kNone);
  for (int64_t n = 0; n < padded; n += Vec::size()) {
    const Vec value = at::vec::fmadd(Vec::loadu(scores + n), Vec(scale), Vec::loadu(mask + n));
    value.store(scores + n);
    largest = at::vec::maximum(largest, value); // a NaN stays one
  }
  const float most = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, largest);
  if (most == kNone) {
    std::fill_n(out, padded, T(0.f));
    return 0.f;
  }
  Vec sum(0.f);
  for (int64_t n = 0; n < padded; n += Vec::size()) {
    const Vec value = (Vec::loadu(scores + n) - Vec(most)).exp_u20();
    sum = sum + value;
    value.store(scores + n);
  }
  at::vec::convert(scores, out, padded);
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
}

// What brgemm multiplies at once: two bf16, side by side, or one float.
template <typename T>
constexpr int64_t kTogether = sizeof(float) / sizeof(T);

// keys (length, d), rows `ld` apart, to (d / kTogether, padded, kTogether), with zeros where there is none.
template <typename T>
void pack_keys(const T* keys, int64_t ld, int64_t length, int64_t d, int64_t padded, T* out) {
  const auto* from = reinterpret_cast<const float*>(keys); // pairs, which are moved as they are
  auto* to = reinterpret_cast<float*>(out);
  const int64_t width = d / kTogether<T>, step = ld / kTogether<T>;
  for (int64_t i = 0; i < width; ++i) std::fill(to + i * padded + length, to + (i + 1) * padded, 0.f);
  for (int64_t n = 0; n < length; n += kTile) {
    for (int64_t i = 0; i < width; i += kTile) {
      const int rows = std::min(kTile, length - n), columns = std::min(kTile, width - i);
      at::vec::transpose_mxn<float>(from + n * step + i, step, to + i * padded + n, padded, rows, columns);
    }
  }
}

// values (length, d), rows `ld` apart, to (padded / kTogether, d, kTogether), likewise.
inline void pack_values(const float* values, int64_t ld, int64_t length, int64_t d, int64_t padded, float* out) {
  for (int64_t n = 0; n < length; ++n) std::copy_n(values + n * ld, d, out + n * d);
  std::fill(out + length * d, out + padded * d, 0.f);
}

inline void pack_values(const at::BFloat16* values, int64_t ld, int64_t length, int64_t d, int64_t padded, at::BFloat16* out) {
  const auto* rows = reinterpret_cast<const uint16_t*>(values);
  auto* pairs = reinterpret_cast<uint32_t*>(out);
  const std::vector<uint16_t> none(d, 0);
  for (int64_t n = 0; n < padded; n += 2) {
    const uint16_t* even = n < length ? rows + n * ld : none.data();
    const uint16_t* odd = n + 1 < length ? rows + (n + 1) * ld : none.data();
    for (int64_t i = 0; i < d; ++i) pairs[n / 2 * d + i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
  }
}

// A tensor (B, H, L, d) whose last dimension is dense.
template <typename T>
struct Heads {
  const T* data;
  int64_t batch, head, row;

  explicit Heads(const at::Tensor& x)
      : data(x.const_data_ptr<T>()), batch(x.stride(0)), head(x.stride(1)), row(x.stride(2)) {}

  const T* at(int64_t b, int64_t h) const {
    return data + b * batch + h * head;
  }
};

// What is added to the scores of a head, in floats: rows `row` apart, -inf for what is no key.
template <typename T>
class Mask {
 public:
  // mask (B, H, queries, keys), or null
  Mask(const at::Tensor* mask, int64_t queries, int64_t keys, int64_t padded)
      : mask_(mask == nullptr ? std::nullopt : std::make_optional<Heads<T>>(*mask)),
        queries_(mask_ && mask_->row != 0 ? queries : 1), keys_(keys), row_(queries_ == 1 ? 0 : padded), seen_(keys),
        rows_(queries_ * padded, kNone), most_(padded) {
    if (!mask_) std::fill_n(rows_.data(), keys, 0.f);
  }

  void go_to(int64_t b, int64_t h) {
    if (!mask_ || mask_->at(b, h) == at_) return;
    at_ = mask_->at(b, h);
    std::fill(most_.begin(), most_.end(), kNone);
    for (int64_t m = 0; m < queries_; ++m) {
      float* row = rows_.data() + m * row_;
      at::vec::convert(at_ + m * mask_->row, row, keys_);
      for (int64_t n = 0; n < keys_; ++n) most_[n] = row[n] == kNone ? most_[n] : 0.f;
    }
    for (seen_ = keys_; seen_ > 0 && most_[seen_ - 1] == kNone;) --seen_;
  }

  // Keys up to the last one that any of the queries sees.
  int64_t seen() const {
    return seen_;
  }

  const float* row(int64_t query) const {
    return rows_.data() + query * row_;
  }

 private:
  static constexpr float kNone = -std::numeric_limits<float>::infinity();
  std::optional<Heads<T>> mask_;
  int64_t queries_, keys_, row_, seen_;
  std::vector<float> rows_, most_; // most_: 0 for keys that a query sees
  const T* at_ = nullptr;
};

// out (B, Lq, H, d) of q (B, H, Lq, d), k and v (B, H, Lk, d); mask (B, H, Lq, Lk) is added to scores, or null.
template <typename T>
void attend(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor* mask, float scale,
    const at::Tensor& out) {
  const int64_t heads = q.size(1), queries = q.size(2), d = q.size(3), longest = k.size(2);
  const int64_t widest = (longest + kTile - 1) / kTile * kTile, most = std::min(kQueries, rounded_height(queries));
  const Heads<T> of_queries(q), of_keys(k), of_values(v);
  T* to = out.mutable_data_ptr<T>();
  at::parallel_for(0, q.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> packed_keys(widest * d), packed_values(widest * d), block(most * d), p(most * widest);
    std::vector<float> scores(most * widest), sums(most), y(most * d);
    Mask<T> added(mask, queries, longest, widest);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / heads, h = task % heads;
      added.go_to(b, h);
      const int64_t keys = added.seen(), padded = (keys + kTile - 1) / kTile * kTile;
      pack_keys(of_keys.at(b, h), of_keys.row, keys, d, padded, packed_keys.data());
      pack_values(of_values.at(b, h), of_values.row, keys, d, padded, packed_values.data());
      for (int64_t first = 0; first < queries; first += kQueries) {
        const int64_t count = std::min(kQueries, queries - first), height = rounded_height(count);
        T* rows = to + ((b * queries + first) * heads + h) * d; // heads * d apart
        if (keys == 0) {
          for (int64_t m = 0; m < count; ++m) std::fill_n(rows + m * heads * d, d, T(0.f));
          continue;
        }
        for (int64_t m = 0; m < count; ++m) {
          std::copy_n(of_queries.at(b, h) + (first + m) * of_queries.row, d, block.data() + m * d);
        }
        at::native::cpublas::brgemm(
            height, padded, d, d, padded, padded, /*add_C=*/false, block.data(), packed_keys.data(), scores.data());
        for (int64_t m = 0; m < count; ++m) {
          sums[m] = softmax_row(scores.data() + m * padded, added.row(first + m), scale, padded, p.data() + m * padded);
        }
        at::native::cpublas::brgemm(
            height, d, padded, padded, d, d, /*add_C=*/false, p.data(), packed_values.data(), y.data());
        for (int64_t m = 0; m < count; ++m) {
          const Vec inverse(sums[m] == 0.f ? 0.f : 1.f / sums[m]);
          at::vec::map([&](Vec x) { return x * inverse; }, y.data() + m * d, y.data() + m * d, d);
          at::vec::convert(y.data() + m * d, rows + m * heads * d, d);
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

// (B, H, Lq, d) of queries over keys; what is not for the kernel of short sequences, ATen's own does.
inline at::Tensor attention_cpu(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask, std::optional<double> scale) {
  const auto type = q.scalar_type();
  const int64_t d = q.size(-1);
  const bool is_plain = q.dim() == 4 && q.sizes().slice(0, 2) == k.sizes().slice(0, 2) && k.sizes() == v.sizes() &&
      k.size(3) == d && k.scalar_type() == type && v.scalar_type() == type && (!mask || mask->scalar_type() == type);
  const bool is_known = (type == at::kFloat && has_float_brgemm()) || (type == at::kBFloat16 && has_brgemm());
  // for few queries, as in writing, keys are not worth the packing
  const bool is_short = is_plain && k.size(2) > 0 && k.size(2) <= std::min(kLongest, 2 * q.size(2)) && d <= kWidestHead &&
      d % kTile == 0;
  if (!is_short || !is_known) {
    const at::Tensor out =
        std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0., /*is_causal=*/false, mask, scale));
    return out.transpose(1, 2).contiguous().transpose(1, 2); // as below, whatever it is
  }
  const auto dense = [](const at::Tensor& x) { // with rows that start where pairs do
    return x.stride(-1) == 1 && x.stride(-2) % 2 == 0 ? x : x.contiguous();
  };
  at::Tensor added;
  if (mask) added = dense(mask->expand({q.size(0), q.size(1), q.size(2), k.size(2)}));
  const at::Tensor out = at::empty({q.size(0), q.size(2), q.size(1), d}, q.options());
  const float factor = scale ? static_cast<float>(*scale) : 1.f / std::sqrt(static_cast<float>(d));
  const auto* masked = mask ? &added : nullptr;
  if (type == at::kFloat) {
    attend<float>(dense(q), dense(k), dense(v), masked, factor, out);
  } else {
    attend<at::BFloat16>(dense(q), dense(k), dense(v), masked, factor, out);
  }
  return out.transpose(1, 2);
}

} // namespace d2dmoe
