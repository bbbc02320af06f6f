// The tiles of a matrix unit (AMX): eight registers of 16 rows by 64 bytes, and what can be done with them.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX512) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define D2DMOE_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace d2dmoe {

#if defined(D2DMOE_TILES)
constexpr bool kHasMatrixUnit = true;

// The shapes of the tiles. ATen's brgemm, which sets up its own, is not to be called between `set_up` and `release`.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {}; // of a row
  uint8_t rows[16] = {};

  void set(int tile, int64_t of_rows, int64_t of_bytes) {
    rows[tile] = static_cast<uint8_t>(of_rows), bytes[tile] = static_cast<uint16_t>(of_bytes);
  }

  void set_up() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }

  static void release() { asm volatile("tilerelease"); }
};

// Linux wants to be asked for tiles.
inline bool tiles_may_be_used() {
  constexpr long kRequest = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool may = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return may;
}

// Compilers' own functions for these take numbers of tiles that are no template's, and GCC's do not say what they read.
template <int tile>
void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// Rows `stride` bytes apart, as for `store_tile`.
template <int tile>
void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}

// sum += rows columns, of pairs in bf16 where sums are floats, else of fours of uint8 with int8
template <int sum, int rows, int columns, typename Sum>
void multiply_tiles() {
  if constexpr (std::is_same_v<Sum, float>) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(rows), "i"(columns));
  } else {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(rows), "i"(columns));
  }
}
#else
constexpr bool kHasMatrixUnit = false;

inline bool tiles_may_be_used() {
  return false;
}
#endif

} // namespace d2dmoe
