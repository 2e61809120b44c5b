// Pixels times weights in integers, for processors that multiply bytes: AVX-512 VNNI, four products a lane.
//
// Pixels are bytes already. A float32 number becomes three signed bytes and a unit, one unit for the 16 columns of a
// panel each: unit * (65536 d0 + 256 d1 + d2) is off by at most 2^-24 of the largest number of its column, which is
// what rounding a float32 sum costs. Sums of products are exact in int32, so their bits depend on no order.
#include "cpu/simd.h"
#include "vlmfast/kernels.h"

#if VLMFAST_ISA_ID == VLMFAST_AVX512

namespace vlmfast {
namespace VLMFAST_ISA {

static constexpr int64_t ROWS = BYTE_ROWS, COLUMNS = BYTE_COLUMNS, DIGITS = BYTE_DIGITS;
static_assert(COLUMNS == W, "a column a lane");
static constexpr float LARGEST = 8355000.0f;  // its digits, and those of what rounds to a little more, fit signed bytes

// The largest magnitude seen, and whether anything was not finite.
struct Range {
  V largest = set1(0.0f);
  Mask broken = 0;
  void see(V v) {
    v = abs(v);
    broken |= _mm512_cmp_ps_mask(v, set1(3.402823466e38f), _CMP_NLE_UQ);  // true for NaN
    largest = max(v, largest);
  }
};

// Sums of the lanes in double.
struct Sum {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  void add(V v) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
  }
  void store(double* lanes) const {
    _mm512_storeu_pd(lanes, low);
    _mm512_storeu_pd(lanes + 8, high);
  }
};

// What a number is multiplied by to become a whole one; 0 for a column without any number to keep.
static inline float steps(float largest, bool broken) {
  return broken || largest < LARGEST * 1.2e-38f ? 0.0f : LARGEST / largest;
}
static inline float unit_of(float largest, bool broken) { return broken ? NAN : largest / LARGEST; }

// Sixteen whole numbers to the bytes of their three digits, in the low byte of each lane.
static inline void digits_of(V v, __m512i* digits) {
  const __m512i half = _mm512_set1_epi32(128);
  digits[2] = _mm512_cvtps_epi32(v);
  digits[1] = _mm512_srai_epi32(_mm512_add_epi32(digits[2], half), 8);  // the low digit is signed: it may borrow
  digits[0] = _mm512_srai_epi32(_mm512_add_epi32(digits[1], half), 8);
}

static void weight_digits(const float* w, int64_t rows, int64_t K, const float* scale, const float* shift,
                          int64_t per_channel, int8_t* bytes, int8_t* out, float* unit, double* offsets) {
  const int64_t groups = (K + 3) / 4;
  for (int64_t r = 0; r < COLUMNS; ++r, bytes += DIGITS * groups * 4) {
    const float* row = w + r * K;
    Range range;
    unit[r] = 0.0f;
    for (int64_t d = 0; d < DIGITS; ++d)
      for (int64_t k = r < rows ? K : 0; k < groups * 4; ++k) bytes[d * groups * 4 + k] = 0;
    for (int64_t k0 = 0, c = 0; r < rows && k0 < K; k0 += per_channel, ++c) {
      Sum sum;
      for (int64_t k = 0; k < per_channel; k += W) {
        const V v = _mm512_maskz_loadu_ps(first(per_channel - k), row + k0 + k);
        range.see(mul(v, set1(scale[c])));
        sum.add(v);
      }
      double lanes[COLUMNS], total = 0;
      sum.store(lanes);
      for (double lane : lanes) total += lane;
      offsets[r] += double(shift[c]) * total;
    }
    if (r < rows) {
      const float largest = maximum(range.largest);
      unit[r] = unit_of(largest, range.broken);
      for (int64_t k0 = 0, c = 0; k0 < K; k0 += per_channel, ++c) {
        const V factor = set1(scale[c] * steps(largest, range.broken));
        for (int64_t k = 0; k < per_channel; k += W) {
          const Mask inside = range.broken ? Mask(0) : first(per_channel - k);
          __m512i digits[DIGITS];
          digits_of(mul(_mm512_maskz_loadu_ps(inside, row + k0 + k), factor), digits);
          for (int64_t d = 0; d < DIGITS; ++d)
            _mm512_mask_cvtepi32_storeu_epi8(bytes + d * groups * 4 + k0 + k, first(per_channel - k), digits[d]);
        }
      }
    }
  }
  bytes -= COLUMNS * DIGITS * groups * 4;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t d = 0; d < DIGITS; ++d, out += COLUMNS * 4)
      for (int64_t r = 0; r < COLUMNS; ++r)
        __builtin_memcpy(out + r * 4, bytes + ((r * DIGITS + d) * groups + g) * 4, 4);
}

static void gradient_digits(const float* grad, const int64_t* at, int64_t rows, int64_t columns, int8_t* out,
                            float* unit, double* sums) {
  const Mask inside = first(columns);
  Range range;
  Sum sum;
  for (int64_t n = 0; n < rows; ++n) {
    if (n + 16 < rows) __builtin_prefetch(grad + at[n + 16]);  // rows are too far apart for the processor to guess
    const V v = _mm512_maskz_loadu_ps(inside, grad + at[n]);
    range.see(v);
    sum.add(v);
  }
  double total[COLUMNS];
  sum.store(total);
  float largest[COLUMNS], factor[COLUMNS];
  store(largest, range.largest);
  for (int64_t c = 0; c < COLUMNS; ++c) {
    const bool broken = range.broken >> c & 1;
    unit[c] = unit_of(largest[c], broken);
    factor[c] = steps(largest[c], broken);
    sums[c] += total[c];
  }
  const Mask sound = Mask(inside & ~range.broken);
  for (int64_t n = 0; n < rows; n += 4, out += DIGITS * COLUMNS * 4) {
    __m512i packed[DIGITS] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t i = 0; i < 4 && n + i < rows; ++i) {
      __m512i digits[DIGITS];
      digits_of(mul(_mm512_maskz_loadu_ps(sound, grad + at[n + i]), load(factor)), digits);
      for (int64_t d = 0; d < DIGITS; ++d) {
        const __m512i byte = _mm512_and_si512(digits[d], _mm512_set1_epi32(255));
        packed[d] = _mm512_or_si512(packed[d], _mm512_slli_epi32(byte, unsigned(8 * i)));
      }
    }
    for (int64_t d = 0; d < DIGITS; ++d) _mm512_storeu_si512(out + d * COLUMNS * 4, packed[d]);
  }
}

// sum + the four products of each lane. By name: this set's flags do not include VNNI, and GCC 12 keeps copies of the
// intrinsic's sums in memory.
static inline __m512i dot(__m512i sum, __m512i pixels, __m512i digits) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(pixels), "v"(digits));
  return sum;
}

// sums[r] = unit * the panel's products of row r. 24 sums, 3 digits and a broadcast in 32 registers.
static inline void micro(int64_t groups, const uint8_t* a, const int8_t* b, V unit, V* sums) {
  __m512i acc[DIGITS][ROWS];
#pragma GCC unroll 8
  for (int64_t r = 0; r < ROWS; ++r) acc[0][r] = acc[1][r] = acc[2][r] = _mm512_setzero_si512();
  for (int64_t g = 0; g < groups; ++g, a += ROWS * 4, b += DIGITS * COLUMNS * 4) {
    const __m512i high = _mm512_loadu_si512(b), middle = _mm512_loadu_si512(b + COLUMNS * 4);
    const __m512i low = _mm512_loadu_si512(b + 2 * COLUMNS * 4);
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r) {
      int32_t four;
      __builtin_memcpy(&four, a + r * 4, 4);
      const __m512i pixels = _mm512_set1_epi32(four);
      acc[0][r] = dot(acc[0][r], pixels, high);
      acc[1][r] = dot(acc[1][r], pixels, middle);
      acc[2][r] = dot(acc[2][r], pixels, low);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < ROWS; ++r) {
    const V low = fma(_mm512_cvtepi32_ps(acc[1][r]), set1(256.0f), _mm512_cvtepi32_ps(acc[2][r]));
    sums[r] = mul(unit, fma(_mm512_cvtepi32_ps(acc[0][r]), set1(65536.0f), low));
  }
}

static void products(int64_t groups, const uint8_t* a, const int8_t* b, const float* unit, float* out) {
  V sums[ROWS];
  micro(groups, a, b, load(unit), sums);
  for (int64_t r = 0; r < ROWS; ++r) store(out + r * COLUMNS, sums[r]);
}

static void add_products(int64_t groups, const uint8_t* a, const int8_t* b, const float* unit, const float* factor,
                         int64_t rows, int64_t columns, float* out, int64_t ld) {
  V square[COLUMNS];
  for (int64_t r = 0; r < COLUMNS; r += ROWS)
    if (r < rows)
      micro(groups, a + r * groups * 4, b, load(unit), square + r);
    else
      for (int64_t i = 0; i < ROWS; ++i) square[r + i] = set1(0.0f);
  transpose(square);
  const Mask inside = first(rows);
  const V scale = _mm512_maskz_loadu_ps(inside, factor);
  for (int64_t c = 0; c < columns; ++c)
    _mm512_mask_storeu_ps(out + c * ld, inside, fma(square[c], scale, _mm512_maskz_loadu_ps(inside, out + c * ld)));
}

static void pack_columns(const uint8_t* x, int64_t ld, int64_t group, int64_t groups, int64_t K, uint8_t* out) {
  for (int64_t k = 0; k < K; k += 16) {
    __m128i rows[4];
    for (int64_t i = 0; i < 4; ++i) rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i * ld + k));
    const __m128i a = _mm_unpacklo_epi8(rows[0], rows[1]), b = _mm_unpacklo_epi8(rows[2], rows[3]);
    const __m128i c = _mm_unpackhi_epi8(rows[0], rows[1]), d = _mm_unpackhi_epi8(rows[2], rows[3]);
    uint8_t* to = out + k * groups * 4 + group * ROWS * 4;
    for (int64_t half = 0; half < 2; ++half, to += ROWS * groups * 4) {
      __m128i* at = reinterpret_cast<__m128i*>(to);
      _mm_storeu_si128(at, _mm_unpacklo_epi16(half ? c : a, half ? d : b));
      _mm_storeu_si128(at + 1, _mm_unpackhi_epi16(half ? c : a, half ? d : b));
    }
  }
}

extern const Bytes bytes;
const Bytes bytes = {weight_digits, gradient_digits, pack_columns, products, add_products};

}  // namespace VLMFAST_ISA
}  // namespace vlmfast

#endif
