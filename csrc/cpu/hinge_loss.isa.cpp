// Max-margin losses over a tile of S (Faghri et al. 2018): every violation, or the hardest of each row and column.
#include "cpu/tile.h"

namespace vlmfast {
namespace VLMFAST_ISA {

// The positive of row i, where it lies in this tile, may not be its own negative.
static inline void drop_diagonal(const Tile& tile) {
  for (int64_t i = 0; i < tile.m; ++i) {
    const int64_t j = tile.i0 + i - tile.j0;
    if (j >= 0 && j < tile.n) tile.s[i * TILE_LD + j] = -INFINITY;
  }
}

void hinge_sum(const Tile& tile, float margin, const float* diagonal, bool gradient, double* row_loss, float* row_count,
               float* col_count) {
  drop_diagonal(tile);
  const V zero = set1(0.0f), one = set1(1.0f), slack = set1(margin);
  float positive[TILE_N], counts[TILE_N];
  for (int64_t j = 0; j < TILE_N; ++j) positive[j] = j < tile.n ? diagonal[tile.j0 + j] : 0.0f, counts[j] = 0.0f;
  for (int64_t i = 0; i < tile.m; ++i) {
    const V own = set1(diagonal[tile.i0 + i]);
    V loss = zero, active = zero;
    for (int64_t j = 0; j < tile.n; j += W) {
      float* s = tile.s + i * TILE_LD + j;
      const Mask inside = first(tile.n - j);
      const V near = add(slack, load(s));
      const V by_row = sub(near, own), by_col = sub(near, load(positive + j));
      loss = add(loss, select(inside, add(max(zero, by_row), max(zero, by_col)), zero));
      if (gradient) {
        const V row_hit = select(both(inside, gt(by_row, zero)), one, zero);
        const V col_hit = select(both(inside, gt(by_col, zero)), one, zero);
        active = add(active, row_hit);
        store(counts + j, add(load(counts + j), col_hit));
        store(s, add(row_hit, col_hit));
      }
    }
    row_loss[tile.i0 + i] += sum(loss);
    row_count[tile.i0 + i] += sum(active);
  }
  for (int64_t j = 0; j < tile.n; ++j) col_count[tile.j0 + j] += counts[j];
}

void hinge_hardest(const Tile& tile, float* row_best, int64_t* row_arg, float* col_best, int64_t* col_arg) {
  drop_diagonal(tile);
  const V none = set1(-INFINITY);
  float best[TILE_N], arg[TILE_N];  // a row of a tile fits a float exactly
  for (int64_t j = 0; j < TILE_N; ++j) best[j] = j < tile.n ? col_best[tile.j0 + j] : INFINITY, arg[j] = -1.0f;
  for (int64_t i = 0; i < tile.m; ++i) {
    V top = none;
    for (int64_t j = 0; j < tile.n; j += W) {
      const V z = load(tile.s + i * TILE_LD + j), old = load(best + j);
      top = max(select(first(tile.n - j), z, none), top);
      const Mask better = gt(z, old);  // strictly: the first index keeps a tie
      store(best + j, select(better, z, old));
      store(arg + j, select(better, set1(float(i)), load(arg + j)));
    }
    const float row_top = maximum(top);
    if (row_top > row_best[tile.i0 + i]) {
      int64_t j = 0;
      while (tile.s[i * TILE_LD + j] != row_top) ++j;
      row_best[tile.i0 + i] = row_top;
      row_arg[tile.i0 + i] = tile.j0 + j;
    }
  }
  for (int64_t j = 0; j < tile.n; ++j)
    if (arg[j] >= 0.0f) {
      col_best[tile.j0 + j] = best[j];
      col_arg[tile.j0 + j] = tile.i0 + int64_t(arg[j]);
    }
}

}  // namespace VLMFAST_ISA
}  // namespace vlmfast
