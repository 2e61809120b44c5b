// Pairwise sigmoid loss over a tile of S, value and gradient in one pass: no row depends on another.
#include "cpu/tile.h"

namespace vlmfast {
namespace VLMFAST_ISA {

// v with one lane set to 0.
static inline V without(V v, int64_t lane) {
  float lanes[W];
  store(lanes, v);
  lanes[lane] = 0.0f;
  return load(lanes);
}

void sigmoid(const Tile& tile, int64_t offset, float scale, float bias, float weight, bool gradient, double* row_loss,
             double* row_bias) {
  const V zero = set1(0.0f), one = set1(1.0f), factor = set1(scale), shift = set1(bias), share = set1(weight);
  for (int64_t i = 0; i < tile.m; ++i) {
    float* s = tile.s + i * TILE_LD;
    const int64_t diagonal = tile.i0 + i + offset - tile.j0;
    const bool here = diagonal >= 0 && diagonal < tile.n;
    const float positive = here ? s[diagonal] * scale + bias : 0.0f;

    V loss = zero, slope = zero;
    for (int64_t j = 0; j < tile.n; j += W) {
      const Mask inside = first(tile.n - j);
      const V z = fma(load(s + j), factor, shift);
      const V e = exp2(mul(abs(z), set1(-1.4426950408889634f)));  // exp(-|z|), never above 1
      // softplus(z) = max(z, 0) + log(1 + exp(-|z|))
      V term = select(inside, add(max(zero, z), log1p01(e)), zero);
      if (here && diagonal >= j && diagonal < j + W) term = without(term, diagonal - j);
      loss = add(loss, term);
      if (gradient) {
        const V g = mul(div(select(gt(z, zero), one, e), add(one, e)), share);
        slope = add(slope, select(inside, g, zero));
        store(s + j, g);
      }
    }
    double row = sum(loss), tilt = sum(slope);
    if (here) {
      // softplus(-z): the positive's own term, in double, for it may be many times smaller than the rest
      row += positive > 0 ? log1p(exp(-double(positive))) : log1p(exp(double(positive))) - positive;
      const float was = s[diagonal];
      if (gradient) {
        s[diagonal] = -weight / (1.0f + expf(positive));  // sigmoid(z) - 1, without the cancellation
        tilt += double(s[diagonal]) - was;
      }
    }
    row_loss[tile.i0 + i] += row;
    row_bias[tile.i0 + i] += tilt;
  }
}

}  // namespace VLMFAST_ISA
}  // namespace vlmfast
