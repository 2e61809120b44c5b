// Softmax cross-entropy over a tile of S, in both directions from one exponential an element (docs/maths.md).
//
// All exponents are base 2 of z2 = z log2(e). A tile's sums are kept as (reference, total) pairs meaning
// 2^reference * total, with integer references, so that rebasing them is exact.
#include "cpu/tile.h"

namespace vlmfast {
namespace VLMFAST_ISA {

// With every row's and column's top within 2^-60 of the tile's, what falls below 2^-126 is under 2^-66 of any sum.
static constexpr float ONE_EXP_SPREAD = 60.0f;
// In the backward p = 2^(z2 - m) * 2^(m - lse2): with m the least lse2, the first factor stays under 2^100, and where
// it falls below 2^-126 so does p.
static constexpr double ONE_EXP_LSE_SPREAD = 100.0;

// 2^n of an integer n.
static inline double power2(float n) {
  if (n != n) return NAN;
  return n < -1000.0f ? 0.0 : n > 1000.0f ? INFINITY : ldexp(1.0, int(n));
}

// (reference, total) += (r, t)
static inline void merge(float* reference, double* total, float r, double t) {
  if (t == 0.0) return;
  if (r > *reference) {
    *total = *total * power2(*reference - r) + t;
    *reference = r;
  } else {
    *total += t * power2(r - *reference);
  }
}

struct Tops {
  float row[TILE_M], col[TILE_N], positive_row[TILE_M], positive_col[TILE_N];
};

// s = z2; the largest z2 of each row and column, and of their positives. NaN is skipped: it will show in the sums.
template <bool POSITIVES>
static void scale_and_top(const Tile& tile, float scale2, const int32_t* row_ids, const int32_t* col_ids, Tops& tops) {
  const V none = set1(-INFINITY), factor = set1(scale2);
  for (int64_t j = 0; j < TILE_N; j += W) {
    store(tops.col + j, none);
    if (POSITIVES) store(tops.positive_col + j, none);
  }
  for (int64_t i = 0; i < tile.m; ++i) {
    V top = none, positive_top = none;
    for (int64_t j = 0; j < tile.n; j += W) {
      float* s = tile.s + i * TILE_LD + j;
      const V z = select(first(tile.n - j), mul(load(s), factor), none);
      store(s, z);
      top = max(z, top);
      store(tops.col + j, max(z, load(tops.col + j)));
      if (POSITIVES) {
        const V p = select(same(col_ids + j, row_ids[i]), z, none);
        positive_top = max(p, positive_top);
        store(tops.positive_col + j, max(p, load(tops.positive_col + j)));
      }
    }
    tops.row[i] = maximum(top);
    if (POSITIVES) tops.positive_row[i] = maximum(positive_top);
  }
}

struct Sums {
  float row[TILE_M], col[TILE_N], positive_row[TILE_M], positive_col[TILE_N];
};

// Row and column sums of 2^(z2 - reference), and of the positives' z2 (OUT) or powers (IN). With ONE_EXP the row's
// exponential serves the column as well.
template <bool ONE_EXP, int FORM>
static void sum_powers(const Tile& tile, const Tops& refs, const int32_t* row_ids, const int32_t* col_ids, Sums& sums) {
  const V zero = set1(0.0f);
  for (int64_t j = 0; j < TILE_N; j += W) {
    store(sums.col + j, zero);
    if (FORM != INDEX) store(sums.positive_col + j, zero);
  }
  for (int64_t i = 0; i < tile.m; ++i) {
    const V row_ref = set1(refs.row[i]);
    V total = zero, positive = zero;
    for (int64_t j = 0; j < tile.n; j += W) {
      const V z = load(tile.s + i * TILE_LD + j);
      const V row_power = exp2(sub(z, row_ref));
      const V col_power = ONE_EXP ? row_power : exp2(sub(z, load(refs.col + j)));
      total = add(total, row_power);
      store(sums.col + j, add(load(sums.col + j), col_power));
      if (FORM != INDEX) {
        const Mask match = both(same(col_ids + j, row_ids[i]), first(tile.n - j));
        V for_row = z, for_col = z;
        if (FORM == IN) {
          for_row = ONE_EXP ? row_power : exp2(sub(z, set1(refs.positive_row[i])));
          for_col = ONE_EXP ? col_power : exp2(sub(z, load(refs.positive_col + j)));
        }
        positive = add(positive, select(match, for_row, zero));
        store(sums.positive_col + j, add(load(sums.positive_col + j), select(match, for_col, zero)));
      }
    }
    sums.row[i] = sum(total);
    if (FORM != INDEX) sums.positive_row[i] = sum(positive);
  }
}

// Whether every top of these n is within the spread of `top`; a side without any (-inf) does not count when `optional`.
static bool within(const float* tops, int64_t n, float top, bool optional) {
  bool all = true;
  for (int64_t i = 0; i < n; ++i) all &= tops[i] >= top - ONE_EXP_SPREAD || (optional && tops[i] == -INFINITY);
  return all;
}

static void merge_side(const Running& running, int form, int64_t begin, int64_t count, const float* refs,
                       const float* sums, const float* positive_refs, const float* positive_sums) {
  for (int64_t i = 0; i < count; ++i) {
    merge(running.reference + begin + i, running.total + begin + i, refs[i], sums[i]);
    if (form == OUT) running.positive[begin + i] += positive_sums[i];
    if (form == IN)
      merge(running.positive_reference + begin + i, running.positive + begin + i, positive_refs[i], positive_sums[i]);
  }
}

template <int FORM>
static void forward_of(const Tile& tile, const SoftmaxCall& call, const Running& rows, const Running& cols) {
  int32_t row_ids[TILE_M], col_ids[TILE_N];
  for (int64_t i = 0; i < tile.m; ++i) row_ids[i] = call.rows.ids[tile.i0 + i];
  for (int64_t j = 0; j < TILE_N; ++j) col_ids[j] = j < tile.n ? call.cols.ids[tile.j0 + j] : 0;

  Tops tops;
  Sums sums;
  scale_and_top<FORM == IN>(tile, call.scale * float(LOG2E), row_ids, col_ids, tops);
  if (FORM == INDEX) {
    for (int64_t i = 0; i < tile.m; ++i) {
      const int64_t j = row_ids[i] - tile.j0;
      if (j >= 0 && j < tile.n) rows.positive[tile.i0 + i] = log_power(tile.s[i * TILE_LD + j]);
    }
    for (int64_t j = 0; j < tile.n; ++j) {
      const int64_t i = col_ids[j] - tile.i0;
      if (i >= 0 && i < tile.m) cols.positive[tile.j0 + j] = log_power(tile.s[i * TILE_LD + j]);
    }
  }

  float top = -INFINITY;
  for (int64_t i = 0; i < tile.m; ++i) top = tops.row[i] > top ? tops.row[i] : top;
  const bool one_exp =
      within(tops.row, tile.m, top, false) && within(tops.col, tile.n, top, false) &&
      (FORM != IN || (within(tops.positive_row, tile.m, top, true) && within(tops.positive_col, tile.n, top, true)));
  for (int64_t i = 0; i < tile.m; ++i) tops.row[i] = reference_of(one_exp ? top : tops.row[i]);
  for (int64_t j = 0; j < tile.n; ++j) tops.col[j] = reference_of(one_exp ? top : tops.col[j]);
  if (FORM == IN) {
    for (int64_t i = 0; i < tile.m; ++i) tops.positive_row[i] = reference_of(one_exp ? top : tops.positive_row[i]);
    for (int64_t j = 0; j < tile.n; ++j) tops.positive_col[j] = reference_of(one_exp ? top : tops.positive_col[j]);
  }
  if (one_exp || (FORM != IN && !call.cols.weight))  // without columns, each row may have its own reference
    sum_powers<true, FORM>(tile, tops, row_ids, col_ids, sums);
  else
    sum_powers<false, FORM>(tile, tops, row_ids, col_ids, sums);

  if (call.rows.weight)
    merge_side(rows, FORM, tile.i0, tile.m, tops.row, sums.row, tops.positive_row, sums.positive_row);
  if (call.cols.weight)
    merge_side(cols, FORM, tile.j0, tile.n, tops.col, sums.col, tops.positive_col, sums.positive_col);
}

void softmax_forward(const Tile& tile, const SoftmaxCall& call, const Running& rows, const Running& cols) {
  if (call.form == OUT)
    forward_of<OUT>(tile, call, rows, cols);
  else if (call.form == IN)
    forward_of<IN>(tile, call, rows, cols);
  else
    forward_of<INDEX>(tile, call, rows, cols);
}

// One side's part in a tile's gradient, for its SIZE rows or columns: w p = 2^(z2 - reference) * factor.
template <int64_t SIZE>
struct Factors {
  int32_t ids[SIZE];
  double weight[SIZE];             // w times the incoming gradient; 0 where the side is absent
  double lse[SIZE];                // log-sum-exp in base 2
  double target[SIZE];             // what p is pulled to at a positive; IN: unused
  float reference[SIZE];           // a whole number
  float factor[SIZE];              // w 2^(reference - lse)
  float matched[SIZE];             // IN: the same at a positive, less what pulls it up
  float positive_reference[SIZE];  // IN: what else pulls a positive up: 2^(z2 - positive_reference) * positive_factor
  float positive_factor[SIZE];
  float pull[SIZE];      // OUT: w * target
  float everyone[SIZE];  // smoothing w / (length of the other side)
};

template <int64_t SIZE>
static void fill(Factors<SIZE>& f, const SoftmaxSide& side, const SoftmaxCall& call, float grad, int64_t begin,
                 int64_t count, int64_t others) {
  for (int64_t i = 0; i < SIZE; ++i) {
    const bool here = i < count && side.weight;
    f.ids[i] = i < count ? side.ids[begin + i] : -1;
    f.weight[i] = here ? double(grad) * side.weight[begin + i] : 0.0;
    f.lse[i] = here ? side.lse[begin + i] * LOG2E : INFINITY;
    const double share = here ? (call.form == OUT ? double(side.share[begin + i]) : 1.0) : 0.0;
    f.target[i] = (1.0 - double(call.smoothing)) * share;
    f.pull[i] = float(f.weight[i] * f.target[i]);
    f.everyone[i] = float(double(call.smoothing) * f.weight[i] / double(others));
  }
}

// The factors of one side, with `base` as reference for all where one exponential serves, else with its own for each.
template <int64_t SIZE>
static void refer(Factors<SIZE>& f, const SoftmaxSide& side, int form, int64_t begin, int64_t count, bool one_exp,
                  double base) {
  for (int64_t i = 0; i < SIZE; ++i) {
    const bool here = i < count && side.weight;
    // 2^(z2 - infinity) = 0 for what is not there
    f.reference[i] = !here ? INFINITY : float(one_exp ? base : floor(f.lse[i]));
    const double power = here ? ::exp2(double(f.reference[i]) - f.lse[i]) : 0.0;
    f.factor[i] = f.matched[i] = float(f.weight[i] * power);
    f.positive_reference[i] = INFINITY;
    f.positive_factor[i] = 0.0f;
    if (form != IN || !here) continue;
    const double positive = side.positive_lse[begin + i] * LOG2E, gap = f.lse[i] - positive;
    if (gap < double(ONE_EXP_SPREAD)) {
      // p - r = p (1 - 2^gap): exact also where nearly all of a row's mass is on its positives
      f.matched[i] = float(f.weight[i] * power * -expm1(gap * LN2));
    } else if (positive > -INFINITY) {
      f.positive_reference[i] = float(floor(positive));
      f.positive_factor[i] = float(f.weight[i] * ::exp2(floor(positive) - positive));
    }
  }
}

// dL/dz at a positive, z from log_power, in double: p - 1 near p = 1, the gradient of a pair that is nearly solved,
// would be all rounding.
static inline float at_positive(const Factors<TILE_M>& rows, const Factors<TILE_N>& cols, int64_t i, int64_t j,
                                double z, bool row_hit, bool col_hit) {
  const double by_row = rows.weight[i] == 0.0 ? 0.0 : expm1((z - rows.lse[i]) * LN2) + 1.0 * !row_hit;
  const double by_col = cols.weight[j] == 0.0 ? 0.0 : expm1((z - cols.lse[j]) * LN2) + 1.0 * !col_hit;
  return float(rows.weight[i] * (by_row + (row_hit ? 1.0 - rows.target[i] : 0.0)) - rows.everyone[i] +
               cols.weight[j] * (by_col + (col_hit ? 1.0 - cols.target[j] : 0.0)) - cols.everyone[j]);
}

template <bool ONE_EXP, int FORM>
static void gradient_of(const Tile& tile, float scale2, bool smoothing, bool singles, const Factors<TILE_M>& rows,
                        const Factors<TILE_N>& cols, float base) {
  const V factor = set1(scale2), shift = set1(base), zero = set1(0.0f);
  for (int64_t i = 0; i < tile.m; ++i) {
    for (int64_t j = 0; j < tile.n; j += W) {
      float* s = tile.s + i * TILE_LD + j;
      const V z = mul(load(s), factor);
      const Mask match = FORM == INDEX ? first(0) : same(cols.ids + j, rows.ids[i]);
      V row = set1(rows.factor[i]), col = load(cols.factor + j);
      if (FORM == IN) {
        row = select(match, set1(rows.matched[i]), row);
        col = select(match, load(cols.matched + j), col);
      }
      V g;
      if (ONE_EXP) {  // w_i p_row + w_j p_col from one power
        g = mul(exp2(sub(z, shift)), add(row, col));
      } else {
        g = mul(exp2(sub(z, set1(rows.reference[i]))), row);
        g = fma(exp2(sub(z, load(cols.reference + j))), col, g);
      }
      if (FORM == IN && count(match)) {
        V r = mul(exp2(sub(z, set1(rows.positive_reference[i]))), set1(rows.positive_factor[i]));
        r = fma(exp2(sub(z, load(cols.positive_reference + j))), load(cols.positive_factor + j), r);
        g = sub(g, select(match, r, zero));
      }
      if (FORM == OUT) g = sub(g, select(match, add(set1(rows.pull[i]), load(cols.pull + j)), zero));
      if (smoothing) g = sub(g, add(set1(rows.everyone[i]), load(cols.everyone + j)));
      store(s, g);
      if (FORM == OUT && singles && count(match)) {
        float logits[W];
        store(logits, z);
        for (int64_t l = 0; l < W && j + l < tile.n; ++l)
          if (cols.ids[j + l] == rows.ids[i])
            s[l] = at_positive(rows, cols, i, j + l, log_power(logits[l]), true, true);
      }
    }
  }
}

// Whether one of these has a single positive, which alone it may match fully.
template <int64_t SIZE>
static bool any_single(const Factors<SIZE>& f, float smoothing) {
  bool any = false;
  for (int64_t i = 0; i < SIZE; ++i) any |= f.weight[i] != 0.0 && f.target[i] >= 1.0 - double(smoothing);
  return any;
}

template <int FORM>
static void backward_of(const Tile& tile, const SoftmaxCall& call, float grad) {
  Factors<TILE_M> rows;
  Factors<TILE_N> cols;
  fill(rows, call.rows, call, grad, tile.i0, tile.m, call.pair.y.rows);
  fill(cols, call.cols, call, grad, tile.j0, tile.n, call.pair.x.rows);

  double least = INFINITY, most = -INFINITY;
  bool finite = true;  // false with a NaN among them: two exponentials carry it to the right places
  const auto widen = [&](double lse) {
    least = lse < least ? lse : least;
    most = lse > most ? lse : most;
    finite &= lse - lse == 0.0;
  };
  for (int64_t i = 0; call.rows.weight && i < tile.m; ++i) widen(rows.lse[i]);
  for (int64_t j = 0; call.cols.weight && j < tile.n; ++j) widen(cols.lse[j]);
  const bool one_exp = finite && most - least < ONE_EXP_LSE_SPREAD;
  refer(rows, call.rows, FORM, tile.i0, tile.m, one_exp, floor(least));
  refer(cols, call.cols, FORM, tile.j0, tile.n, one_exp, floor(least));

  const float scale2 = call.scale * float(LOG2E);
  double row_logit[TILE_M], col_logit[TILE_N];  // of the positives, which the gradient overwrites
  const auto column_of = [&](int64_t i) { return rows.ids[i] - tile.j0; };
  const auto row_of = [&](int64_t j) { return cols.ids[j] - tile.i0; };
  const auto in_cols = [&](int64_t j) { return j >= 0 && j < tile.n; };
  const auto in_rows = [&](int64_t i) { return i >= 0 && i < tile.m; };
  if (FORM == INDEX) {
    for (int64_t i = 0; i < tile.m; ++i)
      if (in_cols(column_of(i))) row_logit[i] = log_power(tile.s[i * TILE_LD + column_of(i)] * scale2);
    for (int64_t j = 0; j < tile.n; ++j)
      if (in_rows(row_of(j))) col_logit[j] = log_power(tile.s[row_of(j) * TILE_LD + j] * scale2);
  }
  const bool smoothing = call.smoothing != 0.0f;
  const bool singles = FORM == OUT && (any_single(rows, call.smoothing) || any_single(cols, call.smoothing));
  if (one_exp)
    gradient_of<true, FORM>(tile, scale2, smoothing, singles, rows, cols, float(floor(least)));
  else
    gradient_of<false, FORM>(tile, scale2, smoothing, singles, rows, cols, 0.0f);
  if (FORM == INDEX) {
    for (int64_t i = 0; i < tile.m; ++i)
      if (const int64_t j = column_of(i); in_cols(j))
        tile.s[i * TILE_LD + j] = at_positive(rows, cols, i, j, row_logit[i], true, row_of(j) == i);
    for (int64_t j = 0; j < tile.n; ++j)
      if (const int64_t i = row_of(j); in_rows(i))
        tile.s[i * TILE_LD + j] = at_positive(rows, cols, i, j, col_logit[j], column_of(i) == j, true);
  }
}

void softmax_backward(const Tile& tile, const SoftmaxCall& call, float grad) {
  if (call.form == OUT)
    backward_of<OUT>(tile, call, grad);
  else if (call.form == IN)
    backward_of<IN>(tile, call, grad);
  else
    backward_of<INDEX>(tile, call, grad);
}

}  // namespace VLMFAST_ISA
}  // namespace vlmfast
