// Cross-entropy over a tile of a language model's logits. Exponents are base 2 of z2 = z log2(e).
#include "cpu/tile.h"

namespace vlmfast {
namespace VLMFAST_ISA {

void vocabulary_logits(const Tile& tile, const VocabularyCall& call, const LogitParts& parts) {
  const V none = set1(-INFINITY), zero = set1(0.0f), factor = set1(float(LOG2E));
  float bias[TILE_N];
  for (int64_t j = 0; j < TILE_N; ++j) bias[j] = call.bias && j < tile.n ? call.bias[tile.j0 + j] : 0.0f;
  for (int64_t i = 0; i < tile.m; ++i) {
    float* s = tile.s + i * TILE_LD;
    V top = none;
    for (int64_t j = 0; j < tile.n; j += W) {
      const V z = mul(add(load(s + j), load(bias + j)), factor);
      store(s + j, z);
      top = max(select(first(tile.n - j), z, none), top);
    }
    parts.reference[i] = reference_of(maximum(top));
    const V reference = set1(parts.reference[i]);
    V total = zero, logits = zero;
    for (int64_t j = 0; j < tile.n; j += W) {
      const Mask inside = first(tile.n - j);
      const V z = load(s + j);
      total = add(total, select(inside, exp2(sub(z, reference)), zero));
      if (call.smoothing != 0.0f) logits = add(logits, select(inside, z, zero));
    }
    parts.total[i] = sum(total);
    if (call.smoothing != 0.0f) parts.logits[i] = sum(logits);
    const int64_t label = call.labels[tile.i0 + i] - tile.j0;
    if (label >= 0 && label < tile.n) parts.target[i] = log_power(s[label]);
  }
}

void vocabulary_gradient(const Tile& tile, const VocabularyCall& call, const double* lse, float* dbias) {
  float columns[TILE_N] = {};
  for (int64_t i = 0; i < tile.m; ++i) {
    float* s = tile.s + i * TILE_LD;
    const int64_t label = call.labels[tile.i0 + i] - tile.j0;
    const bool here = label >= 0 && label < tile.n;
    const double w = call.weight[tile.i0 + i], lse2 = lse[tile.i0 + i] * LOG2E, whole = floor(lse2);
    const double rise = 2.0 * double(call.z_loss) * lse[tile.i0 + i];  // d(loss)/d(lse) = 1 + rise
    const double smooth = double(call.smoothing) / double(call.w.rows);
    // At the label in double: p - 1 near p = 1 would be all rounding.
    const double change = here ? expm1((log_power(s[label]) - lse2) * LN2) : 0.0;
    const float own = float(w * ((1.0 + rise) * change + rise + double(call.smoothing) - smooth));

    const V reference = set1(float(whole)), everyone = set1(float(w * smooth));
    const V factor = set1(float(w * (1.0 + rise) * ::exp2(whole - lse2)));
    for (int64_t j = 0; j < tile.n; j += W) store(s + j, sub(mul(exp2(sub(load(s + j), reference)), factor), everyone));
    if (here) s[label] = own;
    for (int64_t j = 0; dbias && j < tile.n; j += W) store(columns + j, add(load(columns + j), load(s + j)));
  }
  for (int64_t j = 0; dbias && j < tile.n; ++j) dbias[tile.j0 + j] += columns[j];
}

}  // namespace VLMFAST_ISA
}  // namespace vlmfast
