// Some of a tensor's memory, to see writes past autograd, as `weight.data.copy_` makes them: no version counts these.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <cstring>

namespace d2dmoe {

constexpr int64_t kSampledWords = 16; // so few that they are read while others still come from memory

class MemorySample {
 public:
  explicit MemorySample(const at::Tensor& tensor) : words_(words_of(tensor)) {}

  bool is_of(const at::Tensor& tensor) const { return words_ == words_of(tensor); }

 private:
  using Words = std::array<uint64_t, kSampledWords>;

  // From all parts of it evenly; of a tensor with gaps, and one of fewer bytes, what begins it.
  static Words words_of(const at::Tensor& tensor) {
    Words words{};
    const int64_t bytes = static_cast<int64_t>(tensor.nbytes()), word = sizeof(uint64_t);
    if (bytes == 0) return words;
    const char* memory = static_cast<const char*>(tensor.const_data_ptr());
    if (bytes < word || !tensor.is_non_overlapping_and_dense()) {
      std::memcpy(words.data(), memory, tensor.element_size());
      return words;
    }
    for (int64_t i = 0; i < kSampledWords; ++i) {
      const int64_t at = (2 * i + 1) * (bytes - word) / (2 * kSampledWords);
      std::memcpy(&words[i], memory + at, word);
    }
    return words;
  }

  Words words_;
};

} // namespace d2dmoe
