// A head's attention in bf16 on the tiles of a matrix unit (AMX).
#pragma once

#include "attention.h"
#include "deep_tiles.h"
#include "int8_products.h"

#include <algorithm>
#include <limits>
#include <vector>

#if defined(D2DMOE_TILES)

namespace d2dmoe {

class TileHead { // see BrgemmHead
 public:
  static constexpr int64_t kQueries = 32; // whose scores stay in the first cache

  static bool is_there() { return tiles_may_be_used(); }

  TileHead(int64_t longest, int64_t queries, int64_t d)
      : d_(d), depth_(whole(d)), keys_(in_tiles(longest) * depth_), values_(d * whole(longest)),
        block_((queries + kBehind) * depth_), p_((queries + kBehind) * apart(longest)),
        scores_((queries + kBehind) * in_tiles(longest)), inverses_(queries) {}

  void take(
      const at::BFloat16* keys, int64_t keys_apart, const at::BFloat16* values, int64_t values_apart, int64_t length) {
    padded_ = in_tiles(length), apart_ = apart(length);
    take_keys(keys, keys_apart, length);
    take_values(values, values_apart, length);
  }

  template <typename M, typename Out>
  void attend(
      const at::BFloat16* queries, int64_t apart, int64_t count, const Mask<M>& mask, int64_t first, float scale, Out* out,
      int64_t out_apart) {
    for (int64_t m = 0; m < count; ++m) std::copy_n(queries + m * apart, d_, block_.data() + m * depth_);
    tiles_.multiply_into(
        block_.data(), depth_ * 2, count, keys_.data(), padded_, depth_ * 2, scores_.data(), padded_);
    for (int64_t m = 0; m < count; ++m) {
      at::BFloat16* weights = p_.data() + m * apart_;
      const float sum = softmax(scores_.data() + m * padded_, mask.row(first + m), scale, weights);
      inverses_[m] = sum == 0.f ? 0.f : 1.f / sum;
      std::fill_n(weights + padded_, whole(padded_) - padded_, at::BFloat16(0.f));
    }
    tiles_.multiply<float>(
        p_.data(), apart_ * 2, count, values_.data(), d_, whole(padded_) * 2,
        [inverses = inverses_.data(), out, out_apart](int64_t m, int64_t n, const float* sums) {
          store_as(Vec::loadu(sums) * Vec(inverses[m]), out + m * out_apart + n);
        });
  }

 private:
  static constexpr int64_t kDepth = DeepTiles::kDepth / 2; // numbers, of which the last are zeros in keys and values

  static int64_t whole(int64_t depth) { return (depth + kDepth - 1) / kDepth * kDepth; }

  static int64_t apart(int64_t length) { return DeepTiles::apart(in_tiles(length) * 2) / 2; }

  // As `softmax_row`, but for what it gives, which goes to `out`.
  float softmax(float* scores, const float* mask, float scale, at::BFloat16* out) const {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    __m512 largest[2] = {_mm512_set1_ps(kNone), _mm512_set1_ps(kNone)};
    __mmask16 odd = 0; // NaNs, which largest ones are not
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t n = 0; n < padded_; n += kWidth) {
      const __m512 value = _mm512_fmadd_ps(_mm512_loadu_ps(scores + n), factor, _mm512_loadu_ps(mask + n));
      _mm512_storeu_ps(scores + n, value);
      largest[n / kWidth % 2] = _mm512_max_ps(value, largest[n / kWidth % 2]);
      odd |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    }
    const float most = _mm512_reduce_max_ps(_mm512_max_ps(largest[0], largest[1]));
    if (odd != 0 || most == std::numeric_limits<float>::infinity()) { // which exp_u20 makes a number of
      std::fill_n(out, padded_, std::numeric_limits<at::BFloat16>::quiet_NaN());
      return std::numeric_limits<float>::quiet_NaN();
    }
    if (most == kNone) {
      std::fill_n(out, padded_, at::BFloat16(0.f));
      return 0.f;
    }
    Vec sum(0.f);
    for (int64_t n = 0; n < padded_; n += kWidth) {
      const Vec value = (Vec::loadu(scores + n) - Vec(most)).exp_u20();
      sum = sum + value;
      store_as(value, out + n);
    }
    return _mm512_reduce_add_ps(sum);
  }

  // (length, d) to (padded / kTile, depth / 2, kTile, 2)
  void take_keys(const at::BFloat16* keys, int64_t ld, int64_t length) {
    const auto* from = reinterpret_cast<const float*>(keys); // pairs, which are moved as they are
    auto* to = reinterpret_cast<float*>(keys_.data());
    const int64_t width = d_ / 2, depth = depth_ / 2;
    if (length < padded_ || width < depth) std::fill_n(to, padded_ * depth, 0.f);
    for (int64_t n = 0; n < length; n += kTile) {
      for (int64_t i = 0; i < width; i += kTile) {
        const int rows = std::min(kTile, length - n), columns = std::min(kTile, width - i);
        at::vec::transpose_mxn<float>(from + n * (ld / 2) + i, ld / 2, to + n * depth + i * kTile, kTile, rows, columns);
      }
    }
  }

  // (length, d) to (d / kTile, whole(length) / 2, kTile, 2)
  void take_values(const at::BFloat16* values, int64_t ld, int64_t length) {
    const auto* rows = reinterpret_cast<const uint16_t*>(values);
    auto* pairs = reinterpret_cast<uint32_t*>(values_.data());
    const int64_t depth = whole(length) / 2;
    const auto half = [&](int64_t n, int64_t i) {
      const auto* from = reinterpret_cast<const __m256i*>(rows + n * ld + i);
      return n < length ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(from)) : _mm512_setzero_si512();
    };
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = 0; i < d_; i += kTile) {
        const __m512i both = _mm512_or_si512(half(2 * k, i), _mm512_slli_epi32(half(2 * k + 1, i), 16));
        _mm512_storeu_si512(pairs + i * depth + k * kTile, both);
      }
    }
  }

  DeepTiles tiles_;
  int64_t d_, depth_, padded_ = 0, apart_ = 0;
  std::vector<at::BFloat16> keys_, values_, block_, p_;
  std::vector<float> scores_, inverses_;
};

} // namespace d2dmoe

#endif
