#include <cmath>
#include <numeric>

#include "cpu/drive.h"

namespace vlmfast {

// to[i] += coefficient * unit row `from` of `source`
static void add_row(const Matrix& source, int64_t D, const float* inverse, int64_t from, float coefficient, float* row,
                    float* to) {
  kernels().pack_slices(source, D, inverse, from, 1, D, row);
  for (int64_t d = 0; d < D; ++d) to[d] += coefficient * row[d];
}

static double hinge_sum(const Pair& pair, float margin, const float* diagonal, Sweep& sweep, float* dx, float* dy) {
  const int64_t B = pair.x.rows, D = pair.D;
  Scratch<double> row_loss(B, 0.0);
  Scratch<float> row_count(B, 0.0f), col_count(B, 0.0f), row(D);
  const bool gradient = dx || dy;
  sweep.run(
      [&](const Tile& tile) { kernels().hinge_sum(tile, margin, diagonal, gradient, row_loss, row_count, col_count); });
  double loss = 0;
  for (int64_t i = 0; i < B; ++i) {
    loss += row_loss[i];
    // Each active term also pulls its positive: dL/dS_ii = -(active in row i + active in column i).
    const float pull = -(row_count[i] + col_count[i]);
    if (dx) add_row(pair.y, D, sweep.y_inverse(), i, pull, row, dx + i * D);
    if (dy) add_row(pair.x, D, sweep.x_inverse(), i, pull, row, dy + i * D);
  }
  return loss;
}

// The gradient touches one negative a row and a column: a gather and a scatter instead of products.
static double hinge_hardest(const Pair& pair, float margin, const float* diagonal, Sweep& sweep, float* dx, float* dy) {
  const int64_t B = pair.x.rows, D = pair.D;
  Scratch<float> row_best(B, -INFINITY), col_best(B, -INFINITY), row(D);
  Scratch<int64_t> row_arg(B, int64_t(-1)), col_arg(B, int64_t(-1));
  sweep.run([&](const Tile& tile) { kernels().hinge_hardest(tile, row_best, row_arg, col_best, col_arg); });
  double loss = 0;
  const auto pull = [&](int64_t i, int64_t j, float sign) {  // dL/dS_ij += sign
    if (dx) add_row(pair.y, D, sweep.y_inverse(), j, sign, row, dx + i * D);
    if (dy) add_row(pair.x, D, sweep.x_inverse(), i, sign, row, dy + j * D);
  };
  for (int64_t i = 0; i < B; ++i) {
    const float by_row = margin + row_best[i] - diagonal[i], by_col = margin + col_best[i] - diagonal[i];
    if (!(by_row <= 0.0f)) loss += by_row;  // NaN passes
    if (!(by_col <= 0.0f)) loss += by_col;
    if (by_row > 0.0f) pull(i, row_arg[i], 1.0f), pull(i, i, -1.0f);
    if (by_col > 0.0f) pull(col_arg[i], i, 1.0f), pull(i, i, -1.0f);
  }
  return loss;
}

double hinge_loss(const Pair& pair, float margin, bool hardest, float* dx, float* dy) {
  const int64_t B = pair.x.rows;
  Sweep sweep(pair, hardest ? nullptr : dx, hardest ? nullptr : dy);
  Scratch<int64_t> index(B);
  std::iota(static_cast<int64_t*>(index), index + B, int64_t(0));
  Scratch<float> diagonal(B);
  sweep.dots(index, index, B, diagonal);
  if (!hardest) {
    const double loss = hinge_sum(pair, margin, diagonal, sweep, dx, dy);
    sweep.finish(1.0f);
    return loss;
  }
  for (int64_t i = 0; dx && i < B * pair.D; ++i) dx[i] = 0.0f;
  for (int64_t i = 0; dy && i < B * pair.D; ++i) dy[i] = 0.0f;
  const double loss = hinge_hardest(pair, margin, diagonal, sweep, dx, dy);
  Scratch<double> unused(B);
  const Kernels& k = kernels();
  if (dx) k.finish_gradient(pair.x, pair.D, sweep.x_inverse(), pair.normalize, 1.0f, 0, B, dx, unused);
  if (dy) k.finish_gradient(pair.y, pair.D, sweep.y_inverse(), pair.normalize, 1.0f, 0, B, dy, unused);
  return loss;
}

}  // namespace vlmfast
