// What is to be computed, beside the weights; every array is contiguous.
#pragma once

#include "activations.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace d2dmoe {

struct Problem {
  int64_t tokens;  // N
  int64_t experts; // E
  int64_t neurons; // s, of an expert
  int64_t width;   // d, of a token
  int64_t outputs; // d_out, mostly the same
  const bool* mask;         // (N, E)
  const float* up_bias;     // (E, s) or null
  const float* gate_bias;   // (E, s) or null
  const float* down_bias;   // (d_out,) or null
  Activation activation;
  Cutoffs cutoffs;
};

// y (tokens, outputs) = `start` (outputs,) in each row, or zeros where it is null; rows `ld` apart.
inline void start_rows(const float* start, int64_t tokens, int64_t outputs, float* y, int64_t ld) {
  for (int64_t t = 0; t < tokens; ++t) {
    if (start == nullptr) {
      std::fill_n(y + t * ld, outputs, 0.f);
    } else {
      std::copy_n(start, outputs, y + t * ld);
    }
  }
}

inline const float* at(const float* values, int64_t index) {
  return values == nullptr ? nullptr : values + index;
}

template <typename T>
void grow(std::vector<T>& values, int64_t size) {
  if (static_cast<int64_t>(values.size()) < size) values.resize(size);
}

} // namespace d2dmoe
