// What lies between the two products of experts: the activations of many experts are gathered before any output is added
// to, so that outputs can be added to a few columns at a time, which stay in the cache, and each weight is read once.
#pragma once

#include "plan.h"
#include "problem.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace d2dmoe {

// to (count, depth) = x[rows], of x (N, width), with zeros behind each row
template <typename T>
void gather_rows(const T* x, int64_t width, const int32_t* rows, int64_t count, int64_t depth, T* to) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; i + 2 < count && k < width; k += kLine) __builtin_prefetch(x + rows[i + 2] * width + k);
    std::copy_n(x + rows[i] * width, width, to + i * depth);
    std::fill(to + i * depth + width, to + (i + 1) * depth, T(0));
  }
}

// Activations of some tokens by a chunk of an expert's neurons.
struct Part {
  int64_t expert, chunk;
  const int32_t* rows; // of tokens
  int64_t count;       // of them
  int64_t first;       // row of the activations
};

template <typename T>
class HiddenRows {
 public:
  // Rows that may be read, though not written, behind the last.
  static constexpr int64_t kBehind = 15;

  // Where the rows (count, ld) of a part go, of as many numbers as for every other part.
  T* add(int64_t expert, int64_t chunk, const int32_t* rows, int64_t count, int64_t ld) {
    ld_ = ld;
    parts_.push_back({expert, chunk, rows, count, filled_});
    filled_ += count;
    grow(values_, (filled_ + kBehind) * ld);
    return values_.data() + (filled_ - count) * ld;
  }

  const T* of(const Part& part) const { return values_.data() + part.first * ld_; }
  int64_t filled() const { return filled_; } // rows

  // Calls first(expert), which adds the expert's parts, for all of a block, and second() whenever enough wait, and at
  // the end.
  template <typename First, typename Second>
  void run(const Block& block, const First& first, const Second& second) {
    for (int64_t e = block.begin; e < block.end; ++e) {
      first(e);
      if (filled_ * ld_ * static_cast<int64_t>(sizeof(T)) > kBytes) second();
    }
    second();
  }

  // Calls add(part, first column, columns, y from there on, ld of it) for every part and all columns of y (tokens,
  // outputs), `step` at once where the cache does not hold them all; then forgets the parts.
  template <typename F>
  void add_outputs(int64_t tokens, int64_t outputs, int64_t step, float* y, const F& add) {
    if (tokens * outputs * static_cast<int64_t>(sizeof(float)) <= kBytes) {
      for (const Part& part : parts_) add(part, 0, outputs, y, outputs);
    } else {
      grow(panel_, tokens * step);
      float* panel = panel_.data();
      for (int64_t n = 0; n < outputs; n += step) {
        const int64_t columns = std::min(step, outputs - n);
        for (int64_t t = 0; t < tokens; ++t) std::copy_n(y + t * outputs + n, columns, panel + t * step);
        for (const Part& part : parts_) add(part, n, columns, panel, step);
        for (int64_t t = 0; t < tokens; ++t) std::copy_n(panel + t * step, columns, y + t * outputs + n);
      }
    }
    parts_.clear();
    filled_ = 0;
  }

 private:
  static constexpr int64_t kBytes = 1 << 19; // of activations, and of outputs: a cache of a core holds both
  std::vector<Part> parts_;
  int64_t ld_ = 0, filled_ = 0;
  std::vector<T> values_;    // (filled_ + kBehind, ld_)
  std::vector<float> panel_; // (tokens, step)
};

} // namespace d2dmoe
