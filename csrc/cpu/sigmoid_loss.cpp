#include "cpu/drive.h"

namespace vlmfast {

void sigmoid_loss(const Pair& pair, int64_t offset, float scale, float bias, float* dx, float* dy, double* out) {
  const int64_t M = pair.x.rows;
  const float weight = 1.0f / float(M);
  const bool gradient = dx || dy;
  Sweep sweep(pair, dx, dy);
  Scratch<double> row_loss(M, 0.0), row_bias(M, 0.0);
  sweep.run(
      [&](const Tile& tile) { kernels().sigmoid(tile, offset, scale, bias, weight, gradient, row_loss, row_bias); });
  double loss = 0, tilt = 0;
  for (int64_t i = 0; i < M; ++i) loss += row_loss[i], tilt += row_bias[i];
  out[0] = loss / double(M);
  out[1] = gradient ? sweep.finish(scale) : 0.0;
  out[2] = tilt;
}

}  // namespace vlmfast
