// The blocked dot products that every similarity-shaped op shares.
//
// A product C[r, c] += sum_k A[k, r] * B[k, c] runs over *panels*: A packed as [k][MR] and B as [k][NR], so that the
// micro-kernel reads both in order and keeps MR x NR sums in registers; a tile of S serves as A as it lies. Each sum is
// one chain of fused multiply-adds in the order of k, whatever the tile around it: a dot product has the same bits
// wherever it is computed.
#pragma once
#include "cpu/simd.h"
#include "vlmfast/kernels.h"

namespace vlmfast {
namespace VLMFAST_ISA {

#if VLMFAST_ISA_ID == VLMFAST_AVX512
static constexpr int64_t MR = 12, NR = 32;  // 24 sums + 2 of B + 1 of A in 32 registers
#elif VLMFAST_ISA_ID == VLMFAST_AVX2
static constexpr int64_t MR = 6, NR = 16;  // 12 sums + 2 + 1 in 16 registers
#elif VLMFAST_ISA_ID == VLMFAST_NEON
static constexpr int64_t MR = 8, NR = 12;  // 24 sums + 3 + 1 in 32 registers
#else
static constexpr int64_t MR = 4, NR = 8;
#endif
static_assert(TILE_M / 2 % MR == 0 && TILE_N / 2 % MR == 0 && TILE_N / 2 % NR == 0,
              "tiles and their halves hold whole panels");

// FRESH: C = the product. CONTINUE: the chains of C go on. ADD: C += the product; C is fetched while it is computed.
enum Start { FRESH, CONTINUE, ADD };

// C [MR, NR] (+)= sum_k A(r, k) B[k, NR], where A(r, k) = A[r * ROW + k * STEP].
template <int64_t ROW, int64_t STEP, Start START>
static inline void micro(int64_t K, const float* A, const float* B, float* C, int64_t ldc) {
  constexpr int64_t NV = NR / W;
  V acc[MR][NV];
  for (int64_t r = 0; r < MR; ++r)
    for (int64_t v = 0; v < NV; ++v) {
      float* c = C + r * ldc + v * W;
      acc[r][v] = START == CONTINUE ? load(c) : set1(0.0f);
      if (START == ADD) __builtin_prefetch(c, 1);
    }
  for (int64_t k = 0; k < K; ++k, A += STEP, B += NR) {
    V b[NV];
    for (int64_t v = 0; v < NV; ++v) b[v] = load(B + v * W);
#pragma GCC unroll 12
    for (int64_t r = 0; r < MR; ++r) {
      V a = set1(A[r * ROW]);
      for (int64_t v = 0; v < NV; ++v) acc[r][v] = fma(a, b[v], acc[r][v]);
    }
  }
  for (int64_t r = 0; r < MR; ++r)
    for (int64_t v = 0; v < NV; ++v) {
      float* c = C + r * ldc + v * W;
      store(c, START == ADD ? add(load(c), acc[r][v]) : acc[r][v]);
    }
}

// C [rows, cols] += A B with A(r, k) as above and B in panels `b_stride` floats apart. A may be read up to the next
// multiple of MR rows. The cut of B in use stays in the second-level cache while A, smaller, passes by.
template <int64_t ROW, int64_t STEP>
static inline void multiply_add(const float* A, int64_t rows, const float* B, int64_t b_stride, int64_t cols, int64_t K,
                                float* C, int64_t ldc) {
  for (int64_t c = 0; c < cols; c += NR, B += b_stride)
    for (int64_t r = 0; r < rows; r += MR) {
      if (r + MR <= rows && c + NR <= cols) {
        micro<ROW, STEP, ADD>(K, A + r * ROW, B, C + r * ldc + c, ldc);
      } else {  // a panel that runs over the edge: compute it whole, keep the inside
        float edge[MR * NR];
        const int64_t m = rows - r < MR ? rows - r : MR, n = cols - c < NR ? cols - c : NR;
        for (int64_t i = 0; i < MR; ++i)
          for (int64_t j = 0; j < NR; ++j) edge[i * NR + j] = i < m && j < n ? C[(r + i) * ldc + c + j] : 0.0f;
        micro<ROW, STEP, ADD>(K, A + r * ROW, B, edge, NR);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) C[(r + i) * ldc + c + j] = edge[i * NR + j];
      }
    }
}

static constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

// The whole power of two that a sum with this largest exponent is counted in.
static inline float reference_of(float top) { return top > -INFINITY ? ceilf(top) : 0.0f; }

// log2 of 2^z2 as the sums hold it, polynomial and all: where a positive is nearly all of its row's sum, log total -
// this is 0 to the last bit, and so are loss and gradient.
static inline double log_power(float z2) {
  const float n = nearbyintf(z2);
  float power[W];
  store(power, exp2(set1(z2 - n)));
  return double(n) + log2(double(power[0]));
}

}  // namespace VLMFAST_ISA
}  // namespace vlmfast
