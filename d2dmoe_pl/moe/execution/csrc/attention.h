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

inline int64_t in_tiles(int64_t n) {
  return (n + kTile - 1) / kTile * kTile;
}

// scores (padded,) of one query become exp(scale scores + mask - the largest); their sum is returned, 0 where the mask
// leaves no key. `padded` is a multiple of kTile.
inline float softmax_row(float* scores, const float* mask, float scale, int64_t padded) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  Vec largest(kNone);
  for (int64_t n = 0; n < padded; n += Vec::size()) {
    const Vec value = at::vec::fmadd(Vec::loadu(scores + n), Vec(scale), Vec::loadu(mask + n));
    value.store(scores + n);
    largest = at::vec::maximum(largest, value); // a NaN stays one
  }
  const float most = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, largest);
  if (most == kNone) {
    std::fill_n(scores, padded, 0.f);
    return 0.f;
  }
  if (!std::isfinite(most)) { // which exp_u20 makes a number of
    std::fill_n(scores, padded, std::numeric_limits<float>::quiet_NaN());
    return std::numeric_limits<float>::quiet_NaN();
  }
  Vec sum(0.f);
  for (int64_t n = 0; n < padded; n += Vec::size()) {
    const Vec value = (Vec::loadu(scores + n) - Vec(most)).exp_u20();
    sum = sum + value;
    value.store(scores + n);
  }
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
template <typename T>
void pack_values(const T* values, int64_t ld, int64_t length, int64_t d, int64_t padded, T* out) {
  if constexpr (kTogether<T> == 1) {
    for (int64_t n = 0; n < length; ++n) std::copy_n(values + n * ld, d, out + n * d);
    std::fill(out + length * d, out + padded * d, 0.f);
  } else {
    const auto* rows = reinterpret_cast<const uint16_t*>(values);
    auto* pairs = reinterpret_cast<uint32_t*>(out);
    const std::vector<uint16_t> none(d, 0);
    for (int64_t n = 0; n < padded; n += 2) {
      const uint16_t* even = n < length ? rows + n * ld : none.data();
      const uint16_t* odd = n + 1 < length ? rows + (n + 1) * ld : none.data();
      for (int64_t i = 0; i < d; ++i) pairs[n / 2 * d + i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
    }
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

// A head's attention by ATen's brgemm.
template <typename T>
class BrgemmHead {
 public:
  static constexpr int64_t kQueries = 64; // at once

  // for at most so many keys and queries at once
  BrgemmHead(int64_t longest, int64_t queries, int64_t d)
      : d_(d), keys_(in_tiles(longest) * d), values_(keys_.size()), block_(rounded_height(queries) * d),
        p_(std::is_same_v<T, float> ? 0 : rounded_height(queries) * in_tiles(longest)),
        scores_(rounded_height(queries) * in_tiles(longest)), sums_(queries), y_(block_.size()) {}

  // keys and values (length, d), rows so far apart
  void take(const T* keys, int64_t keys_apart, const T* values, int64_t values_apart, int64_t length) {
    padded_ = in_tiles(length);
    pack_keys(keys, keys_apart, length, d_, padded_, keys_.data());
    pack_values(values, values_apart, length, d_, padded_, values_.data());
  }

  // out (count, d) of queries (count, d), rows so far apart; the first of these has row `first` of the mask
  void attend(
      const T* queries, int64_t apart, int64_t count, const Mask<T>& mask, int64_t first, float scale, T* out,
      int64_t out_apart) {
    const int64_t height = rounded_height(count);
    for (int64_t m = 0; m < count; ++m) std::copy_n(queries + m * apart, d_, block_.data() + m * d_);
    unit_.held = true;
    at::native::cpublas::brgemm(
        height, padded_, d_, d_, padded_, padded_, /*add_C=*/false, block_.data(), keys_.data(), scores_.data());
    for (int64_t m = 0; m < count; ++m) {
      sums_[m] = softmax_row(scores_.data() + m * padded_, mask.row(first + m), scale, padded_);
    }
    at::native::cpublas::brgemm(
        height, d_, padded_, padded_, d_, d_, /*add_C=*/false, weights(count), values_.data(), y_.data());
    for (int64_t m = 0; m < count; ++m) {
      const Vec inverse(sums_[m] == 0.f ? 0.f : 1.f / sums_[m]);
      at::vec::map([&](Vec x) { return x * inverse; }, y_.data() + m * d_, y_.data() + m * d_, d_);
      at::vec::convert(y_.data() + m * d_, out + m * out_apart, d_);
    }
  }

 private:
  const T* weights(int64_t count) {
    if constexpr (std::is_same_v<T, float>) {
      return scores_.data();
    } else {
      at::vec::convert(scores_.data(), p_.data(), count * padded_);
      return p_.data();
    }
  }

  HeldUnit unit_;
  int64_t d_, padded_ = 0;
  std::vector<T> keys_, values_, block_, p_;
  std::vector<float> scores_, sums_, y_;
};

// out (B, Lq, H, d) of q (B, H, Lq, d), k and v (B, H, Lk, d); mask (B, H, Lq, Lk) is added to scores, or null.
template <typename T, typename Head>
void attend(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor* mask, float scale,
    const at::Tensor& out) {
  const int64_t heads = q.size(1), queries = q.size(2), d = q.size(3), longest = k.size(2);
  const Heads<T> of_queries(q), of_keys(k), of_values(v);
  T* to = out.mutable_data_ptr<T>();
  constexpr int64_t kQueries = Head::kQueries;
  at::parallel_for(0, q.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    Head head(longest, std::min(kQueries, queries), d);
    Mask<T> added(mask, queries, longest, in_tiles(longest));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / heads, h = task % heads;
      added.go_to(b, h);
      const int64_t keys = added.seen(), apart = heads * d;
      T* rows = to + (b * queries * heads + h) * d;
      if (keys == 0) {
        for (int64_t m = 0; m < queries; ++m) std::fill_n(rows + m * apart, d, T(0.f));
        continue;
      }
      head.take(of_keys.at(b, h), of_keys.row, of_values.at(b, h), of_values.row, keys);
      for (int64_t first = 0; first < queries; first += kQueries) {
        head.attend(
            of_queries.at(b, h) + first * of_queries.row, of_queries.row, std::min(kQueries, queries - first), added,
            first, scale, rows + first * apart, apart);
      }
    }
  });
}

} // namespace d2dmoe
