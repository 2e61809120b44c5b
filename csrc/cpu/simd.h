// One vector type `V` and its operations, spelled alike for every instruction set.
//
// A file that includes this is compiled once per set, with VLMFAST_ISA naming the set (avx512, avx2, neon, scalar).
// Everything lives in that set's namespace and is static: a weak inline function compiled for AVX-512 could otherwise
// be the one copy that the linker keeps for all sets.
#pragma once
#include <math.h>
#include <stdint.h>

#define VLMFAST_AVX512 1
#define VLMFAST_AVX2 2
#define VLMFAST_NEON 3
#define VLMFAST_SCALAR 4

#if VLMFAST_ISA_ID == VLMFAST_AVX512
#define VLMFAST_ISA avx512
#include <immintrin.h>
#elif VLMFAST_ISA_ID == VLMFAST_AVX2
#define VLMFAST_ISA avx2
#include <immintrin.h>
#elif VLMFAST_ISA_ID == VLMFAST_NEON
#define VLMFAST_ISA neon
#include <arm_neon.h>
#else
#define VLMFAST_ISA scalar
#endif

namespace vlmfast {
namespace VLMFAST_ISA {

// transpose(v) turns W vectors, the rows of a square, into its columns.
//
// In max(a, b) a NaN in either yields `b`: max(v, running) skips NaN, max(bound, v) keeps it.

#if VLMFAST_ISA_ID == VLMFAST_AVX512

using V = __m512;
using Mask = __mmask16;
static constexpr int64_t W = 16;
static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
static inline V set1(float x) { return _mm512_set1_ps(x); }
static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
static inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
static inline V div(V a, V b) { return _mm512_div_ps(a, b); }
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V max(V a, V b) { return _mm512_max_ps(a, b); }
static inline V abs(V a) { return _mm512_abs_ps(a); }
static inline V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V scale2(V a, V n) { return _mm512_scalef_ps(a, n); }
static inline Mask gt(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline Mask le(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
static inline Mask eq(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline Mask same(const int32_t* p, int32_t x) {
  return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(x));
}
static inline Mask first(int64_t n) { return n >= W ? Mask(0xffff) : Mask((1u << n) - 1); }
static inline Mask both(Mask a, Mask b) { return a & b; }
static inline V select(Mask m, V yes, V no) { return _mm512_mask_blend_ps(m, no, yes); }
static inline int count(Mask m) { return __builtin_popcount(m); }
static inline void transpose(V* v) {
  V t[16];
  for (int i = 0; i < 16; i += 2) {  // pairs of rows, then pairs of pairs, then quarters of registers
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      const __m512d a = _mm512_castps_pd(t[i + h]), b = _mm512_castps_pd(t[i + 2 + h]);
      v[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      v[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

#elif VLMFAST_ISA_ID == VLMFAST_AVX2

using V = __m256;
using Mask = __m256;
static constexpr int64_t W = 8;
static inline V load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
static inline V set1(float x) { return _mm256_set1_ps(x); }
static inline V add(V a, V b) { return _mm256_add_ps(a, b); }
static inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
static inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
static inline V div(V a, V b) { return _mm256_div_ps(a, b); }
static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V max(V a, V b) { return _mm256_max_ps(a, b); }
static inline V abs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a * 2^n for n in [-127, 127]; n = -127 gives 0.
static inline V scale2(V a, V n) {
  __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(bits));
}
static inline Mask gt(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
static inline Mask le(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
static inline Mask eq(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline Mask same(const int32_t* p, int32_t x) {
  return _mm256_castsi256_ps(
      _mm256_cmpeq_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi32(x)));
}
static inline Mask first(int64_t n) {
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n > W ? int32_t(W) : int32_t(n)),
                                                _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
static inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
static inline V select(Mask m, V yes, V no) { return _mm256_blendv_ps(no, yes, m); }
static inline int count(Mask m) { return __builtin_popcount(unsigned(_mm256_movemask_ps(m))); }
static inline void transpose(V* v) {
  V t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; ++h) {
      v[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
      v[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    const V low = v[i], high = v[i + 4];
    v[i] = _mm256_permute2f128_ps(low, high, 0x20);
    v[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

#elif VLMFAST_ISA_ID == VLMFAST_NEON

using V = float32x4_t;
using Mask = uint32x4_t;
static constexpr int64_t W = 4;
static inline V load(const float* p) { return vld1q_f32(p); }
static inline void store(float* p, V v) { vst1q_f32(p, v); }
static inline V set1(float x) { return vdupq_n_f32(x); }
static inline V add(V a, V b) { return vaddq_f32(a, b); }
static inline V sub(V a, V b) { return vsubq_f32(a, b); }
static inline V mul(V a, V b) { return vmulq_f32(a, b); }
static inline V div(V a, V b) { return vdivq_f32(a, b); }
static inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
static inline V max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline V abs(V a) { return vabsq_f32(a); }
static inline V round(V a) { return vrndnq_f32(a); }
static inline V scale2(V a, V n) {
  int32x4_t bits = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
  return vmulq_f32(a, vreinterpretq_f32_s32(bits));
}
static inline Mask gt(V a, V b) { return vcgtq_f32(a, b); }
static inline Mask le(V a, V b) { return vcleq_f32(a, b); }
static inline Mask eq(V a, V b) { return vceqq_f32(a, b); }
static inline Mask same(const int32_t* p, int32_t x) { return vceqq_s32(vld1q_s32(p), vdupq_n_s32(x)); }
static inline Mask first(int64_t n) {
  const int32_t lanes[4] = {0, 1, 2, 3};
  return vcgtq_s32(vdupq_n_s32(n > W ? int32_t(W) : int32_t(n)), vld1q_s32(lanes));
}
static inline Mask both(Mask a, Mask b) { return vandq_u32(a, b); }
static inline V select(Mask m, V yes, V no) { return vbslq_f32(m, yes, no); }
static inline int count(Mask m) { return int(vaddvq_u32(vshrq_n_u32(m, 31))); }
static inline void transpose(V* v) {
  const float32x4x2_t a = vtrnq_f32(v[0], v[1]), b = vtrnq_f32(v[2], v[3]);
  v[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  v[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  v[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  v[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

#else

using V = float;
using Mask = bool;
static constexpr int64_t W = 1;
static inline V load(const float* p) { return *p; }
static inline void store(float* p, V v) { *p = v; }
static inline V set1(float x) { return x; }
static inline V add(V a, V b) { return a + b; }
static inline V sub(V a, V b) { return a - b; }
static inline V mul(V a, V b) { return a * b; }
static inline V div(V a, V b) { return a / b; }
static inline V fma(V a, V b, V c) { return a * b + c; }
static inline V max(V a, V b) { return a > b ? a : b; }
static inline V abs(V a) { return fabsf(a); }
static inline V round(V a) { return nearbyintf(a); }
static inline V scale2(V a, V n) {
  union {
    int32_t bits;
    float value;
  } power = {n == n ? (int32_t(n) + 127) << 23 : 0x7fc00000};
  return a * power.value;
}
static inline Mask gt(V a, V b) { return a > b; }
static inline Mask le(V a, V b) { return a <= b; }
static inline Mask eq(V a, V b) { return a == b; }
static inline Mask same(const int32_t* p, int32_t x) { return *p == x; }
static inline Mask first(int64_t n) { return n > 0; }
static inline Mask both(Mask a, Mask b) { return a && b; }
static inline V select(Mask m, V yes, V no) { return m ? yes : no; }
static inline int count(Mask m) { return m; }
static inline void transpose(V*) {}

#endif

// The first n of v's lanes.
static inline void store_first(int64_t n, float* p, V v) {
#if VLMFAST_ISA_ID == VLMFAST_AVX512
  _mm512_mask_storeu_ps(p, first(n), v);
#else
  if (n >= W) return store(p, v);
  float lanes[W];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// Lanes are added in one fixed order, so a sum has the same bits on every call.
static inline float sum(V v) {
  float lanes[W], total = 0;
  store(lanes, v);
  for (int64_t i = 0; i < W; ++i) total += lanes[i];
  return total;
}

static inline float maximum(V v) {
  float lanes[W], top = -INFINITY;
  store(lanes, v);
  for (int64_t i = 0; i < W; ++i) top = lanes[i] > top ? lanes[i] : top;
  return top;
}

// 2^x for x <= 127, relative error < 2 ulp; 0 below -126; NaN stays NaN. Degree-6 minimax polynomial on [-1/2, 1/2].
static inline V exp2(V x) {
  x = max(set1(-127.0f), x);
  V n = round(x), f = sub(x, n);
  V p = fma(set1(0.00015370632172562182f), f, set1(0.0013399808667600155f));
  p = fma(p, f, set1(0.009618373587727547f));
  p = fma(p, f, set1(0.05550329014658928f));
  p = fma(p, f, set1(0.24022647738456726f));
  p = fma(p, f, set1(0.6931471824645996f));
  p = fma(p, f, set1(1.0f));
  return scale2(p, n);
}

// log(1 + e) for e in [0, 1], relative error < 2 ulp: 2 atanh(s), s = e / (2 + e).
static inline V log1p01(V e) {
  V s = div(e, add(e, set1(2.0f))), u = mul(s, s);
  V p = fma(set1(0.2816145420074463f), u, set1(0.2796434462070465f));
  p = fma(p, u, set1(0.4002465009689331f));
  p = fma(p, u, set1(0.6666632294654846f));
  p = fma(p, u, set1(2.0f));
  return mul(p, s);
}

}  // namespace VLMFAST_ISA
}  // namespace vlmfast
