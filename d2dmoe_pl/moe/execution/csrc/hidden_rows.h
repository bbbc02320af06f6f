// What lies between the two products of experts: the activations of many experts are gathered before any output is added
// to, so that outputs can be added to a few columns at a time, which stay in the cache, and each weight is read once.
#pragma once

#include "packed.h"
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
  // the end. y (the block's tokens, outputs) is `start` (outputs,) in each row, zeros where that is null, and what
  // second() adds.
  template <typename First, typename Second>
  void run(
      const Block& block, const float* start, int64_t outputs, float* y, const First& first, const Second& second) {
    start_ = start, tokens_ = block.tokens, outputs_ = outputs, y_ = y, is_begun_ = false;
    for (int64_t e = block.begin; e < block.end; ++e) {
      first(e);
      if (filled_ * ld_ * static_cast<int64_t>(sizeof(T)) > kBytes) second();
    }
    second();
    if (!in_panels()) return;
    for (int64_t t = 0; t < tokens_; ++t) {
      for (int64_t n = 0; n < outputs_; n += columns_) {
        std::copy_n(panel_at(n) + t * columns_, std::min(columns_, outputs_ - n), y_ + t * outputs_ + n);
      }
    }
  }

  // Calls add(part, the part behind it or null, first column, columns, outputs from there on, ld of them) for every part
  // and all columns, kColumns at once where the cache does not hold them all; then forgets the parts.
  template <int64_t kColumns, typename F>
  void add_outputs(const F& add) {
    const auto add_to = [&](int64_t first, int64_t columns, float* to, int64_t ld) {
      if (!is_begun_) start_rows(at(start_, first), tokens_, columns, to, ld);
      for (size_t i = 0; i < parts_.size(); ++i) {
        add(parts_[i], i + 1 < parts_.size() ? &parts_[i + 1] : nullptr, first, columns, to, ld);
      }
    };
    if (in_panels()) {
      columns_ = kColumns; // known to the compiler here, which is faster
      grow(panels_, tokens_ * ((outputs_ + kColumns - 1) / kColumns * kColumns));
      for (int64_t n = 0; n < outputs_; n += kColumns) {
        add_to(n, std::min(kColumns, outputs_ - n), panel_at(n), kColumns);
      }
    } else {
      add_to(0, outputs_, y_, outputs_);
    }
    parts_.clear();
    filled_ = 0;
    is_begun_ = true;
  }

 private:
  static constexpr int64_t kBytes = 1 << 19; // of activations, and of outputs: a cache of a core holds both

  // Whether columns lie apart until all is added: rows as long as a token's are too far apart for the nearest cache, and
  // are written faster one after the other.
  bool in_panels() const { return tokens_ * outputs_ * static_cast<int64_t>(sizeof(float)) > kBytes; }

  float* panel_at(int64_t column) { return panels_.data() + column * tokens_; }

  const float* start_ = nullptr;
  float* y_ = nullptr;
  int64_t tokens_ = 0, outputs_ = 0, columns_ = 0;
  bool is_begun_ = false; // whether outputs hold anything
  std::vector<Part> parts_;
  int64_t ld_ = 0, filled_ = 0;
  std::vector<T> values_;     // (filled_ + kBehind, ld_)
  std::vector<float> panels_; // of columns, each (tokens_, columns_)
};

} // namespace d2dmoe
