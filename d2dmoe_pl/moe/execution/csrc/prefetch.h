// Weights that are asked for some time before they are read, where a CPU does not see that they will be: rows are short
// streams.
#pragma once

#include <algorithm>
#include <cstdint>

namespace d2dmoe {

constexpr int64_t kAhead = 4096; // bytes that are asked for before they are read

// Asks for `count` values, those that are before `end`. A function that does nothing else is without effect to GCC, which
// leaves out its calls unless it inlines them early.
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

} // namespace d2dmoe
