// A head's attention by products of 16-bit integers, of 12 bits each, so that sums over kWidestHead numbers, and over
// kLongest keys, fit 32 bits.
#pragma once

#include "attention.h"
#include "lane_products.h"

#if defined(D2DMOE_VNNI)

namespace d2dmoe {

// Two words a lane; bytes and words are written as what they are, and read as lanes.
class Words {
 public:
  explicit Words(int64_t count) : lanes_(count / 2) {}

  int16_t* words() { return reinterpret_cast<int16_t*>(lanes_.data()); }

  const int32_t* lanes() const { return lanes_.data(); }

 private:
  std::vector<int32_t> lanes_;
};

template <typename T>
class WordHead { // see BrgemmHead
 public:
  static constexpr int64_t kQueries = 24; // whose scores and weights stay in the first cache

  WordHead(int64_t longest, int64_t queries, int64_t d)
      : d_(d), rows_(in_tiles(longest) * d), inverses_(d), steps_(d), words_(rows_.size()), keys_(rows_.size()),
        values_(rows_.size()), block_(queries * d), p_(queries * in_tiles(longest)), scores_(queries * in_tiles(longest)),
        factors_(queries) {}

  void take(const T* keys, int64_t keys_apart, const T* values, int64_t values_apart, int64_t length) {
    length_ = length, padded_ = in_tiles(length);
    take_keys(keys, keys_apart);
    take_values(values, values_apart);
  }

  template <typename M>
  void attend(
      const T* queries, int64_t apart, int64_t count, const Mask<M>& mask, int64_t first, float scale, T* out,
      int64_t out_apart) {
    for (int64_t m = 0; m < count; ++m) {
      const float* row = in_floats(queries + m * apart, rows_.data(), d_);
      Magnitude most;
      for (int64_t i = 0; i < d_; i += kWidth) most.take(Vec::loadu(row + i));
      const float step = step_of(largest_lane(most.lanes()), kQueryKey);
      factors_[m] = step * key_step_ * scale;
      to_words(row, [&](int64_t) { return Vec(1.f / step); }, d_, block_.words() + m * d_);
    }
    const auto store_scores = [&](int64_t m, int64_t n, Whole sums) {
      (at::vec::convert<float>(sums) * Vec(factors_[m])).store(scores_.data() + m * padded_ + n);
    };
    lane_product<OfWords>(block_.lanes(), d_ / 2, count, d_ / 2, keys_.lanes(), padded_, padded_, store_scores);
    for (int64_t m = 0; m < count; ++m) {
      float* row = scores_.data() + m * padded_;
      const float sum = softmax_row(row, mask.row(first + m), 1.f, padded_);
      to_words(row, [](int64_t) { return Vec(kWeight); }, padded_, p_.words() + m * padded_);
      factors_[m] = sum == 0.f ? 0.f : 1.f / (sum * kWeight);
    }
    const auto store_values = [&](int64_t m, int64_t n, Whole sums) {
      store_as(at::vec::convert<float>(sums) * Vec(factors_[m]) * Vec::loadu(steps_.data() + n), out + m * out_apart + n);
    };
    lane_product<OfWords>(p_.lanes(), padded_ / 2, count, padded_ / 2, values_.lanes(), d_, d_, store_values);
  }

 private:
  static constexpr float kQueryKey = 2047.f, kWeight = 4095.f, kValue = 2047.f; // the largest of each

  // The largest of many numbers but for their signs, NaN where one is: as integers, NaNs are above all others.
  class Magnitude {
   public:
    void take(Vec value) { most_ = _mm512_max_epi32(most_, _mm512_castps_si512(value.abs())); }

    Vec lanes() const { return _mm512_castsi512_ps(most_); }

   private:
    __m512i most_ = _mm512_setzero_si512();
  };

  // What one step stands for; a NaN stays one, and so does all that is rounded by it.
  static float step_of(float most, float steps) {
    return most == 0.f ? 1.f : most / steps;
  }

  template <typename F>
  static void to_words(const float* row, const F& inverse, int64_t count, int16_t* to) {
    for (int64_t i = 0; i < count; i += kWidth) {
      const __m512 value = Vec::loadu(row + i) * inverse(i);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(value)));
    }
  }

  void take_keys(const T* keys, int64_t apart) {
    Magnitude most;
    for (int64_t n = 0; n < length_; ++n) {
      const float* row = in_floats(keys + n * apart, rows_.data() + n * d_, d_);
      for (int64_t i = 0; i < d_; i += kWidth) most.take(Vec::loadu(row + i));
    }
    key_step_ = step_of(largest_lane(most.lanes()), kQueryKey);
    for (int64_t n = 0; n < length_; ++n) {
      const float* row = in_floats(keys + n * apart, rows_.data() + n * d_, d_);
      to_words(row, [&](int64_t) { return Vec(1.f / key_step_); }, d_, words_.words() + n * d_);
    }
    pack_keys(words_.words(), d_, length_, d_, padded_, keys_.words());
  }

  void take_values(const T* values, int64_t apart) {
    for (int64_t i = 0; i < d_; i += kWidth) {
      Magnitude most;
      for (int64_t n = 0; n < length_; ++n) {
        if (!std::is_same_v<T, float> && i == 0) in_floats(values + n * apart, rows_.data() + n * d_, d_);
        most.take(value_row(values, apart, n, i));
      }
      most.lanes().store(steps_.data() + i);
    }
    for (int64_t i = 0; i < d_; ++i) {
      steps_[i] = step_of(steps_[i], kValue);
      inverses_[i] = 1.f / steps_[i];
    }
    for (int64_t n = 0; n < length_; ++n) {
      const float* row = in_floats(values + n * apart, rows_.data() + n * d_, d_);
      to_words(row, [&](int64_t i) { return Vec::loadu(inverses_.data() + i); }, d_, words_.words() + n * d_);
    }
    pack_values(words_.words(), d_, length_, d_, padded_, values_.words());
  }

  Vec value_row(const T* values, int64_t apart, int64_t n, int64_t i) const {
    if constexpr (std::is_same_v<T, float>) {
      return Vec::loadu(values + n * apart + i);
    } else {
      return Vec::loadu(rows_.data() + n * d_ + i);
    }
  }

  int64_t d_, length_ = 0, padded_ = 0;
  float key_step_ = 1.f;
  std::vector<float> rows_, inverses_, steps_;
  Words words_, keys_, values_, block_, p_;
  std::vector<float> scores_, factors_;
};

} // namespace d2dmoe

#endif
