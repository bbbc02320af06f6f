// What is to be computed, beside the weights; every array is contiguous.
#pragma once

#include "activations.h"

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

inline const float* at(const float* values, int64_t index) {
  return values == nullptr ? nullptr : values + index;
}

template <typename T>
void grow(std::vector<T>& values, int64_t size) {
  if (static_cast<int64_t>(values.size()) < size) values.resize(size);
}

} // namespace d2dmoe
