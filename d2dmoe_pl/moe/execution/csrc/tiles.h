// The second product of experts for many tokens, on the tiles of a matrix unit (AMX): 16 tokens by 64 columns at once,
// added to outputs straight away. ATen's brgemm takes longer for products as small as these.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX512) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define D2DMOE_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace d2dmoe {

// Tiles set up for products of a depth of up to 32 groups, as long as this lives; ATen's brgemm is not to be called
// meanwhile. A group is four numbers in int8, or two in bf16; factors hold groups side by side, (groups, width). There may
// be no tiles on this machine.
class Tiles {
 public:
  static constexpr int64_t kRows = 16, kGroups = 16, kColumns = 64;

#if defined(D2DMOE_TILES)
  explicit Tiles(int64_t groups) : groups_(may_be_used() ? groups : 0) {
    if (groups_ == 0) return;
    Config config;
    for (int tile = 0; tile < 4; ++tile) config.set(tile, kRows, 16); // sums
    config.set(4, kRows, first()), config.set(5, first(), 16); // factors of the first kGroups
    if (rest() > 0) config.set(6, kRows, rest()), config.set(7, rest(), 16); // of those behind
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() {
    if (groups_ > 0) asm volatile("tilerelease");
  }
  Tiles(const Tiles&) = delete;

  // Linux wants to be asked for tiles.
  static bool may_be_used() {
    constexpr long kRequest = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool may = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    return may;
  }

  // Whether products of this depth can be computed.
  bool fit(int64_t groups) const { return groups == groups_; }

  // As `int8_add_product`, of kColumns. Reads up to kRows - 1 rows of h behind the last, as `add_bfloat16` does.
  void add_int8(
      const uint8_t* h, int64_t ld, const float* h_scale, bool from_zero, const int8_t* w, int64_t width,
      const float* scale, const int32_t* less, float* y, int64_t y_ld, const int32_t* rows, int64_t count) const {
    __m512 scales[kVectors];
    __m512i off[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      scales[v] = _mm512_loadu_ps(scale + v * 16);
      off[v] = from_zero ? _mm512_setzero_si512() : _mm512_loadu_si512(less + v * 16);
    }
    add_rows<int32_t>(h, ld, w, width, rows, count, [=](const int32_t* sums, int64_t row, int64_t to) {
      const __m512 of_row = _mm512_set1_ps(h_scale[row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const __m512i whole = _mm512_sub_epi32(_mm512_load_si512(sums + v * 16), off[v]);
        const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), of_row);
        float* at = y + to * y_ld + v * 16;
        _mm512_storeu_ps(at, _mm512_fmadd_ps(part, scales[v], _mm512_loadu_ps(at)));
      }
    });
  }

  // y[rows] += h (count, 2 * groups) w, of kColumns
  void add_bfloat16(
      const at::BFloat16* h, int64_t ld, const at::BFloat16* w, int64_t width, float* y, int64_t y_ld,
      const int32_t* rows, int64_t count) const {
    add_rows<float>(h, ld * 2, w, width, rows, count, [=](const float* sums, int64_t, int64_t to) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* at = y + to * y_ld + v * 16;
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_load_ps(sums + v * 16), _mm512_loadu_ps(at)));
      }
    });
  }

 private:
  static constexpr int kVectors = kColumns / 16;

  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {}; // of a row
    uint8_t rows[16] = {};

    void set(int tile, int64_t of_rows, int64_t groups) {
      rows[tile] = static_cast<uint8_t>(of_rows), bytes[tile] = static_cast<uint16_t>(groups * 4);
    }
  };

  int64_t first() const { return std::min(groups_, kGroups); }
  int64_t rest() const { return groups_ - first(); }

  // add(sums of a row, its number, its token) for each of `count` rows of h w; rows of h `stride` bytes apart
  template <typename Sum, typename F>
  [[gnu::always_inline]] void add_rows(
      const void* h, int64_t stride, const void* w, int64_t width, const int32_t* rows, int64_t count,
      const F& add) const {
    alignas(64) Sum sums[2][kRows * kColumns]; // one is added while the tiles fill the other
    const auto* first = static_cast<const char*>(h);
    multiply(first, stride, w, width * 4, sums[0]);
    for (int64_t m = 0; m < count; m += kRows) {
      const Sum* done = sums[m / kRows % 2];
      if (m + kRows < count) multiply(first + (m + kRows) * stride, stride, w, width * 4, sums[(m / kRows + 1) % 2]);
      for (int64_t i = m; i < std::min(m + kRows, count); ++i) add(done + (i - m) * kColumns, i, rows[i]);
    }
  }

  // sums (kRows, kColumns) = h w, of rows `h_stride` and `w_stride` bytes apart
  template <typename Sum>
  void multiply(const char* h, int64_t h_stride, const void* w, int64_t w_stride, Sum* sums) const {
    const auto* columns = static_cast<const char*>(w);
    zero<0>(), zero<1>(), zero<2>(), zero<3>();
    multiply_groups<4, 5, Sum>(h, h_stride, columns, w_stride);
    if (rest() > 0) multiply_groups<6, 7, Sum>(h + kGroups * 4, h_stride, columns + kGroups * w_stride, w_stride);
    constexpr int64_t kRow = kColumns * sizeof(Sum);
    store<0>(sums, kRow), store<1>(sums + 16, kRow), store<2>(sums + 32, kRow), store<3>(sums + 48, kRow);
  }

  template <int of_rows, int of_columns, typename Sum>
  static void multiply_groups(const char* h, int64_t h_stride, const char* w, int64_t w_stride) {
    constexpr int kBytes = 64; // of a tile's row
    load<of_rows>(h, h_stride);
    load<of_columns>(w, w_stride);
    multiply_add<0, of_rows, of_columns, Sum>();
    load<of_columns>(w + kBytes, w_stride);
    multiply_add<1, of_rows, of_columns, Sum>();
    load<of_columns>(w + 2 * kBytes, w_stride);
    multiply_add<2, of_rows, of_columns, Sum>();
    load<of_columns>(w + 3 * kBytes, w_stride);
    multiply_add<3, of_rows, of_columns, Sum>();
  }

  // Compilers' own functions for these take numbers of tiles that are no template's, and GCC's do not say what they read.
  template <int tile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int tile>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
  }
  template <int sum, int rows, int columns, typename Sum>
  static void multiply_add() {
    if constexpr (std::is_same_v<Sum, float>) {
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(rows), "i"(columns));
    } else {
      asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(rows), "i"(columns));
    }
  }

  const int64_t groups_; // 0 where there are no tiles
#else
  explicit Tiles(int64_t) {}
  static bool may_be_used() { return false; }
  bool fit(int64_t) const { return false; }
  template <typename... Any>
  void add_int8(const Any&...) const {}
  template <typename... Any>
  void add_bfloat16(const Any&...) const {}
#endif
};

} // namespace d2dmoe
