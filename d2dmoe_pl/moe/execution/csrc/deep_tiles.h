// Products of many rows over any depth on the tiles of a matrix unit (AMX): 32 rows by 32 columns at once, so that each
// tile that is read is multiplied twice, while the sums before them are given away, and what is multiplied next is
// asked for. ATen's brgemm does one after the other.
#pragma once

#include "tile_unit.h"

#include <algorithm>
#include <cstdint>

namespace d2dmoe {

#if defined(D2DMOE_TILES)
// Holds the unit for its thread from the first product on. Copies hold nothing.
class DeepTiles {
 public:
  static constexpr int64_t kRows = 16, kColumns = 16, kDepth = 64; // of a tile; the last in bytes

  // How far apart, in bytes, rows of `depth` bytes can be read fastest: an odd number of lines, lest they all fall on the
  // same few places of a cache.
  static int64_t apart(int64_t depth) {
    const int64_t lines = (depth + kDepth - 1) / kDepth;
    return (lines + (lines % 2 == 0)) * kDepth;
  }

  DeepTiles() = default;
  DeepTiles(const DeepTiles&) {}
  ~DeepTiles() { release(); }

  void release() {
    if (held_) TileShapes::release();
    held_ = false;
  }

  // give(m, n, the sums of columns n .. n + 16 of row m) for all of a b: a (rows, depth), rows `apart` bytes apart, in
  // uint8 or, for sums in floats, bf16; b (columns / kColumns, depth / 4, kColumns), of four bytes of a column side by
  // side. `depth` is in bytes, a multiple of kDepth, and `columns` one of kColumns. Reads up to 15 rows of a behind the
  // last, and all bytes of `depth` in each. As much as b is long is asked for behind it.
  template <typename Sum, typename F>
  void multiply(
      const void* a, int64_t apart, int64_t rows, const void* b, int64_t columns, int64_t depth, const F& give) {
    if (rows == 0 || columns == 0) return;
    const int64_t blocks = (rows + 2 * kRows - 1) / (2 * kRows) * ((columns + 2 * kColumns - 1) / (2 * kColumns));
    Product of{static_cast<const char*>(a), static_cast<const char*>(b), apart, rows, depth};
    of.next = of.b + depth * columns, of.lines = (columns + blocks - 1) / blocks;
    Waiting<Sum> waiting;
    by_blocks(rows, columns, [&]<int height, int width>(Size<height, width>, int64_t m, int64_t n) {
      give_beside<height, width>(of, m, n, waiting, give);
    });
    waiting.give_away(waiting.left(), give);
  }

  // The same to out (rows, columns), rows `out_apart` numbers apart. Writes up to 15 rows behind the last.
  template <typename Sum>
  void multiply_into(
      const void* a, int64_t apart, int64_t rows, const void* b, int64_t columns, int64_t depth, Sum* out,
      int64_t out_apart) {
    Product of{static_cast<const char*>(a), static_cast<const char*>(b), apart, rows, depth};
    by_blocks(rows, columns, [&]<int height, int width>(Size<height, width>, int64_t m, int64_t n) {
      sum_up<height, width, Sum>(of, m, n, [] {});
      store<height, width>(out + m * out_apart + n, kRows * out_apart, kColumns, out_apart);
    });
  }

 private:
  struct Product {
    const char *a, *b;
    int64_t apart, rows, depth;
    const char* next = nullptr; // to be asked for
    int64_t lines = 0; // of it, at each step
  };

  // Sums of the last block, in tiles side by side, while those of the next are computed beside them.
  template <typename Sum>
  struct Waiting {
    alignas(64) Sum sums[2][4 * kRows * kColumns];
    int last = 0;
    int64_t row = 0, column = 0, rows = 0, width = 0; // of the last block, the width in tiles; none at first
    int64_t given = 0; // rows

    int64_t left() const { return rows - given; }

    void take(int64_t m, int64_t n, int64_t count, int64_t tiles) {
      last = 1 - last, row = m, column = n, rows = count, width = tiles, given = 0;
    }

    template <typename F>
    [[gnu::always_inline]] void give_away(int64_t count, const F& give) {
      for (const int64_t end = std::min(rows, given + count); given < end; ++given) {
        const Sum* from = sums[last] + (given / kRows * width * kRows + given % kRows) * kColumns;
        for (int64_t c = 0; c < width; ++c) give(row + given, column + c * kColumns, from + c * kRows * kColumns);
      }
    }
  };

  void set_up() {
    if (held_) return;
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.set(tile, kRows, 64);
    shapes.set_up();
    held_ = true;
  }

  template <int height, int width>
  struct Size {}; // in tiles

  // Calls f(size, first row, first column) for blocks of up to four tiles.
  template <typename F>
  [[gnu::always_inline]] void by_blocks(int64_t rows, int64_t columns, const F& f) {
    set_up();
    int64_t n = 0;
    if (rows <= kRows) { // each tile of b is read once, so that four of them share one of a
      for (; columns - n >= 4 * kColumns; n += 4 * kColumns) f(Size<1, 4>(), 0, n);
      for (; columns - n >= 2 * kColumns; n += 2 * kColumns) f(Size<1, 2>(), 0, n);
      if (n < columns) f(Size<1, 1>(), 0, n);
      return;
    }
    const auto down = [&]<int width>(Size<1, width> one) {
      int64_t m = 0;
      for (; rows - m > kRows; m += 2 * kRows) f(Size<2, width>(), m, n);
      if (m < rows) f(one, m, n);
    };
    for (; columns - n >= 2 * kColumns; n += 2 * kColumns) down(Size<1, 2>());
    if (n < columns) down(Size<1, 1>());
  }

  template <int height, int width, typename Sum, typename F>
  [[gnu::noinline]] static void give_beside(Product& of, int64_t m, int64_t n, Waiting<Sum>& waiting, const F& give) {
    const int64_t steps = std::max<int64_t>(1, of.depth / kDepth), some = (waiting.left() + steps - 1) / steps;
    sum_up<height, width, Sum>(of, m, n, [&] {
      for (int64_t i = 0; i < of.lines; ++i, of.next += 64) __builtin_prefetch(of.next, 0, 2);
      waiting.give_away(some, give);
    });
    waiting.give_away(waiting.left(), give); // where there is no step
    constexpr int64_t kTile = kRows * kColumns;
    store<height, width>(waiting.sums[1 - waiting.last], width * kTile, kTile, kColumns);
    waiting.take(m, n, std::min(height * kRows, of.rows - m), width);
  }

  // The sums of a block stay in the unit; `beside` is called at each step.
  template <int height, int width, typename Sum, typename F>
  [[gnu::always_inline]] static void sum_up(const Product& of, int64_t m, int64_t n, const F& beside) {
    static_assert(height * width <= 4 && height <= 2);
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    const char *a = of.a + m * of.apart, *b = of.b + n * of.depth;
    const int64_t apart = of.apart, next = kColumns * of.depth;
    for (int64_t k = 0; k < of.depth; k += kDepth, a += kDepth, b += kDepth * kColumns) {
      load_tile<4>(a, apart);
      if constexpr (height > 1) load_tile<5>(a + kRows * apart, apart);
      column<0, height, width, 6, Sum>(b);
      if constexpr (width > 1) column<1, height, width, 7, Sum>(b + next);
      if constexpr (width > 2) column<2, height, width, 6, Sum>(b + 2 * next);
      if constexpr (width > 3) column<3, height, width, 7, Sum>(b + 3 * next);
      beside();
    }
  }

  // A block's sums to rows `apart` numbers apart, tiles `below` one another, and `next` to one another, so far.
  template <int height, int width, typename Sum>
  [[gnu::always_inline]] static void store(Sum* to, int64_t below, int64_t next, int64_t apart) {
    const int64_t bytes = apart * sizeof(Sum);
    store_tile<0>(to, bytes);
    if constexpr (width > 1) store_tile<1>(to + next, bytes);
    if constexpr (width > 2) store_tile<2>(to + 2 * next, bytes), store_tile<3>(to + 3 * next, bytes);
    if constexpr (height > 1) store_tile<width>(to + below, bytes);
    if constexpr (height * width == 4 && height > 1) store_tile<3>(to + below + next, bytes);
  }

  // The sums of a column of tiles, which `tile` holds.
  template <int c, int height, int width, int tile, typename Sum>
  [[gnu::always_inline]] static void column(const char* b) {
    load_tile<tile>(b, 4 * kColumns);
    multiply_tiles<c, 4, tile, Sum>();
    if constexpr (height > 1) multiply_tiles<width + c, 5, tile, Sum>();
  }

  bool held_ = false;
};
#endif

} // namespace d2dmoe
