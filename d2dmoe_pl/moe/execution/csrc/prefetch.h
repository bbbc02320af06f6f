// Weights that are asked for some time before they are read, where a CPU does not see that they will be: rows are short
// streams, and which expert is next it cannot know.
#pragma once

#include "problem.h"

#include <algorithm>
#include <cstdint>

namespace d2dmoe {

constexpr int64_t kAhead = 4096; // bytes that are asked for before they are read

// Asks for `count` values, those that are before `end`.
template <typename T>
void ask_for(const T* values, int64_t count, const T* end) {
  constexpr int64_t kLine = 64; // bytes
  const char* last = reinterpret_cast<const char*>(std::min(values + count, end));
  for (const char* line = reinterpret_cast<const char*>(values); line < last; line += kLine) __builtin_prefetch(line);
}

// The same of what is read some time later.
template <typename T>
void ask_ahead(const T* values, int64_t count, const T* end) {
  ask_for(values + kAhead / static_cast<int64_t>(sizeof(T)), count, end);
}

// Asks for where the weights of an expert begin, up and gate (E, s, d), down (E, s, d_out); gate may be null.
template <typename T>
void ask_for_expert(int64_t expert, const Problem& problem, const T* up, const T* gate, const T* down) {
  constexpr int64_t kFirst = kAhead / static_cast<int64_t>(sizeof(T));
  const auto ask = [&](const T* weights, int64_t size) {
    ask_for(weights + expert * size, kFirst, weights + (expert + 1) * size);
  };
  ask(up, problem.neurons * problem.width);
  if (gate != nullptr) ask(gate, problem.neurons * problem.width);
  ask(down, problem.neurons * problem.outputs);
}

} // namespace d2dmoe
