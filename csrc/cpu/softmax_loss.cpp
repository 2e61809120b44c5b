#include <cmath>

#include "cpu/drive.h"

namespace vlmfast {

// Statistics of one side, owned.
struct Side {
  explicit Side(int64_t n)
      : reference(n, -INFINITY), positive_reference(n, -INFINITY), total(n, 0.0), positive(n, 0.0) {}
  Running running() { return {reference, total, positive_reference, positive}; }
  Scratch<float> reference, positive_reference;
  Scratch<double> total, positive;
};

static constexpr double LN2 = 0.6931471805599453;

// mean_j <u_i, v_j> for every i, of unit rows u and v: what label smoothing adds to the target.
static void mean_similarities(const Pair& pair, const float* x_inverse, const float* y_inverse, bool of_rows,
                              double* out) {
  const Matrix &x = of_rows ? pair.x : pair.y, &y = of_rows ? pair.y : pair.x;
  const float *u = of_rows ? x_inverse : y_inverse, *v = of_rows ? y_inverse : x_inverse;
  const Kernels& k = kernels();
  Scratch<float> row(pair.D);
  Scratch<double> mean(pair.D, 0.0);
  for (int64_t j = 0; j < y.rows; ++j) {
    k.pack_slices(y, pair.D, v, j, 1, pair.D, row);
    for (int64_t d = 0; d < pair.D; ++d) mean[d] += double(row[d]) / double(y.rows);
  }
  for (int64_t i = 0; i < x.rows; ++i) {
    k.pack_slices(x, pair.D, u, i, 1, pair.D, row);
    out[i] = 0;
    for (int64_t d = 0; d < pair.D; ++d) out[i] += row[d] * mean[d];
  }
}

// Writes the side's log-sum-exps and returns its share of the loss, summed in the order of its rows.
static double close(const SoftmaxCall& call, const SoftmaxSide& side, Side& stats, int64_t n, const double* means) {
  if (!side.weight) return 0;
  double loss = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double reference = stats.reference[i], log_total = std::log2(stats.total[i]);
    side.lse[i] = (reference + log_total) * LN2;
    if (call.form == IN) side.positive_lse[i] = (stats.positive_reference[i] + std::log2(stats.positive[i])) * LN2;
    if (side.weight[i] == 0.0f && std::isfinite(side.lse[i])) continue;  // no positive: no term
    double term;
    if (call.form == IN) {
      term = (reference - stats.positive_reference[i]) + (log_total - std::log2(stats.positive[i]));
    } else {
      // reference - target first: both are near, their difference is exact.
      const double target = call.form == OUT ? stats.positive[i] * side.share[i] : stats.positive[i];
      term = (reference - (1.0 - call.smoothing) * target) + log_total;
    }
    term *= LN2;
    if (means) term -= double(call.smoothing) * call.scale * means[i];
    loss += side.weight[i] * term;
  }
  return loss;
}

double softmax_loss_forward(const SoftmaxCall& call, float* kept) {
  const int64_t M = call.pair.x.rows, N = call.pair.y.rows;
  Sweep sweep(call.pair, nullptr, nullptr, kept);
  Side rows(M), cols(N);
  const Running row_stats = rows.running(), col_stats = cols.running();
  sweep.run([&](const Tile& tile) { kernels().softmax_forward(tile, call, row_stats, col_stats); });

  const bool smoothing = call.smoothing != 0.0f;
  Scratch<double> row_means(smoothing ? M : 0), col_means(smoothing ? N : 0);
  if (smoothing) {
    mean_similarities(call.pair, sweep.x_inverse(), sweep.y_inverse(), true, row_means);
    mean_similarities(call.pair, sweep.x_inverse(), sweep.y_inverse(), false, col_means);
  }
  return close(call, call.rows, rows, M, smoothing ? static_cast<double*>(row_means) : nullptr) +
         close(call, call.cols, cols, N, smoothing ? static_cast<double*>(col_means) : nullptr);
}

double softmax_loss_backward(const SoftmaxCall& call, float grad, float* kept, float* dx, float* dy) {
  Sweep sweep(call.pair, dx, dy, kept);
  sweep.run([&](const Tile& tile) { kernels().softmax_backward(tile, call, grad); });
  return sweep.finish(call.scale);
}

}  // namespace vlmfast
