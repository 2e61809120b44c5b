// The blocked dot products that every similarity-shaped op shares.
//
// A product C[r, c] += sum_k A[k, r] * B[k, c] runs over *panels*: A packed as [k][MR] and B as [k][NR], so that the
// micro-kernel reads both in order and keeps MR x NR sums in registers. Each sum is one chain of fused multiply-adds
// in the order of k, whatever the tile around it: a dot product has the same bits wherever it is computed.
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
static_assert(TILE_M % MR == 0 && TILE_N % MR == 0 && TILE_N % NR == 0, "tiles hold whole panels");

static constexpr int64_t panels(int64_t n, int64_t width) { return (n + width - 1) / width; }

// C [MR, NR] (+)= A [K, MR]^T B [K, NR].
template <bool FRESH>
static inline void micro(int64_t K, const float* A, const float* B, float* C, int64_t ldc) {
  constexpr int64_t NV = NR / W;
  V acc[MR][NV];
  for (int64_t r = 0; r < MR; ++r)
    for (int64_t v = 0; v < NV; ++v) acc[r][v] = FRESH ? set1(0.0f) : load(C + r * ldc + v * W);
  for (int64_t k = 0; k < K; ++k, A += MR, B += NR) {
    V b[NV];
    for (int64_t v = 0; v < NV; ++v) b[v] = load(B + v * W);
#pragma GCC unroll 12
    for (int64_t r = 0; r < MR; ++r) {
      V a = set1(A[r]);
      for (int64_t v = 0; v < NV; ++v) acc[r][v] = fma(a, b[v], acc[r][v]);
    }
  }
  for (int64_t r = 0; r < MR; ++r)
    for (int64_t v = 0; v < NV; ++v) store(C + r * ldc + v * W, acc[r][v]);
}

// C [rows, cols] += A^T B, with A in panels of MR rows and B in panels of NR columns, `stride` floats apart.
static inline void multiply_add(const float* A, int64_t a_stride, int64_t rows, const float* B, int64_t b_stride,
                                int64_t cols, int64_t K, float* C, int64_t ldc) {
  for (int64_t c = 0; c < cols; c += NR)
    for (int64_t r = 0; r < rows; r += MR) {
      const float *a = A + r / MR * a_stride, *b = B + c / NR * b_stride;
      if (r + MR <= rows && c + NR <= cols) {
        micro<false>(K, a, b, C + r * ldc + c, ldc);
      } else {  // a panel that runs over the edge: compute it whole, keep the inside
        float edge[MR * NR];
        const int64_t m = rows - r < MR ? rows - r : MR, n = cols - c < NR ? cols - c : NR;
        for (int64_t i = 0; i < MR; ++i)
          for (int64_t j = 0; j < NR; ++j) edge[i * NR + j] = i < m && j < n ? C[(r + i) * ldc + c + j] : 0.0f;
        micro<false>(K, a, b, edge, NR);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) C[(r + i) * ldc + c + j] = edge[i * NR + j];
      }
    }
}

}  // namespace VLMFAST_ISA
}  // namespace vlmfast
