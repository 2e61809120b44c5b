// What every walk over S does: rows as users hold them to panels of unit rows, tiles of products, and gradients back.
#include "cpu/tile.h"

namespace vlmfast {
namespace VLMFAST_ISA {

static inline float bits_to_float(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both = {bits};
  return both.value;
}

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
static inline float to_float(float x) { return x; }
static inline float to_float(Bfloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
static inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  if (magnitude < 0x400) return (sign ? -1.0f : 1.0f) * (float(magnitude) * 0x1p-24f);           // subnormal, zero
  return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));  // the exponent's bias goes from 15 to 127
}

template <class T>
static void inverse_lengths_of(const T* x, int64_t D, bool normalize, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i) {
    if (!normalize) {
      out[i] = 1.0f;
      continue;
    }
    const T* row = x + i * D;
    double parts[8] = {0, 0, 0, 0, 0, 0, 0, 0};  // double: the square of 1e30 still fits
    int64_t k = 0;
    for (; k + 8 <= D; k += 8)
      for (int64_t l = 0; l < 8; ++l) parts[l] += double(to_float(row[k + l])) * to_float(row[k + l]);
    for (; k < D; ++k) parts[0] += double(to_float(row[k])) * to_float(row[k]);
    double square = 0;
    for (double part : parts) square += part;
    const double length = sqrt(square);
    out[i] = float(1.0 / (length < 1e-12 ? 1e-12 : length));
  }
}

static inline V load_scaled(const float* p, float scale) { return mul(load(p), set1(scale)); }
template <class T>
static inline V load_scaled(const T* p, float scale) {
  float lanes[W];
  for (int64_t l = 0; l < W; ++l) lanes[l] = to_float(p[l]) * scale;
  return load(lanes);
}

// [k][width] panels: out[k * width + r] = row r's entry k. Rows beyond the last are zeros.
template <class T>
static void panels_of(const T* x, int64_t D, const float* inverse, int64_t rows, int64_t width, float* out) {
  for (int64_t r0 = 0; r0 < rows; r0 += width, out += D * width)
    for (int64_t r = 0; r < width; r += W) {
      const int64_t lanes = width - r < W ? width - r : W;  // the panel's lanes; of them `here` are rows
      const int64_t here = rows - r0 - r < lanes ? (rows - r0 - r > 0 ? rows - r0 - r : 0) : lanes;
      const T* row = x + (r0 + r) * D;
      const float* scale = inverse + r0 + r;
      int64_t k = 0;
      for (; k + W <= D; k += W) {
        V square[W];
        for (int64_t l = 0; l < W; ++l) square[l] = l < here ? load_scaled(row + l * D + k, scale[l]) : set1(0.0f);
        transpose(square);
        for (int64_t c = 0; c < W; ++c) store_first(lanes, out + (k + c) * width + r, square[c]);
      }
      for (; k < D; ++k)
        for (int64_t l = 0; l < lanes; ++l)
          out[k * width + r + l] = l < here ? to_float(row[l * D + k]) * scale[l] : 0.0f;
    }
}

// [k][width] slices: out[k * width + c] = row k's entry c0 + c. Columns beyond the last are zeros.
template <class T>
static void slices_of(const T* x, int64_t D, const float* inverse, int64_t rows, int64_t width, float* out) {
  for (int64_t c0 = 0; c0 < D; c0 += width) {
    const int64_t n = D - c0 < width ? D - c0 : width;
    for (int64_t k = 0; k < rows; ++k, out += width) {
      const T* row = x + k * D + c0;
      const float scale = inverse[k];
      for (int64_t c = 0; c < n; ++c) out[c] = to_float(row[c]) * scale;
      for (int64_t c = n; c < width; ++c) out[c] = 0.0f;
    }
  }
}

// Calls f(typed pointer to the matrix's data).
template <class F>
static inline void typed(const Matrix& x, F f) {
  if (x.dtype == BFLOAT16)
    f(static_cast<const Bfloat16*>(x.data));
  else if (x.dtype == FLOAT16)
    f(static_cast<const Float16*>(x.data));
  else
    f(static_cast<const float*>(x.data));
}

void inverse_lengths(const Matrix& x, int64_t D, bool normalize, int64_t begin, int64_t end, float* out) {
  typed(x, [&](auto* data) { inverse_lengths_of(data, D, normalize, begin, end, out); });
}

void pack_panels(const Matrix& x, int64_t D, const float* inverse, int64_t begin, int64_t rows, int64_t width,
                 float* out) {
  typed(x, [&](auto* data) { panels_of(data + begin * D, D, inverse + begin, rows, width, out); });
}

void pack_slices(const Matrix& x, int64_t D, const float* inverse, int64_t begin, int64_t rows, int64_t width,
                 float* out) {
  typed(x, [&](auto* data) { slices_of(data + begin * D, D, inverse + begin, rows, width, out); });
}

// Rows outside, as they lie in memory: a row is read once and in order, however large the matrix.
template <class T>
static void columns_of(const T* x, int64_t D, int64_t columns, int64_t rows, int64_t width, float* out) {
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t c0 = 0; c0 < columns; c0 += width) {
      const T* row = x + k * D + c0;
      float* slice = out + c0 * rows + k * width;
      const int64_t n = columns - c0 < width ? columns - c0 : width;
      for (int64_t c = 0; c < n; ++c) slice[c] = to_float(row[c]);
      for (int64_t c = n; c < width; ++c) slice[c] = 0.0f;
    }
}

void pack_columns(const Matrix& x, int64_t D, int64_t column, int64_t columns, int64_t begin, int64_t rows,
                  int64_t width, float* out) {
  typed(x, [&](auto* data) { columns_of(data + begin * D + column, D, columns, rows, width, out); });
}

void accumulate_columns(const Tile& tile, const float* y_slices, int64_t columns, int64_t D, float* dx) {
  multiply_add<TILE_LD, 1>(tile.s, tile.m, y_slices, tile.n * NR, columns, tile.n, dx, D);
}

// K is cut so that a panel's cut of B stays in the first-level cache while panels of A pass by.
static constexpr int64_t K_CUT = 256;

void similarity_tile(const float* x_panels, const float* y_panels, int64_t D, const Tile& tile) {
  for (int64_t k = 0; k < D; k += K_CUT) {
    const int64_t K = D - k < K_CUT ? D - k : K_CUT;
    for (int64_t c = 0; c < tile.n; c += NR)
      for (int64_t r = 0; r < tile.m; r += MR) {
        const float *a = x_panels + r * D + k * MR, *b = y_panels + c * D + k * NR;
        float* out = tile.s + r * TILE_LD + c;
        k == 0 ? micro<1, MR, FRESH>(K, a, b, out, TILE_LD) : micro<1, MR, CONTINUE>(K, a, b, out, TILE_LD);
      }
  }
}

void accumulate(const Tile& tile, const float* x_slices, const float* y_slices, int64_t D, float* dx, float* dy) {
  if (dx) multiply_add<TILE_LD, 1>(tile.s, tile.m, y_slices, tile.n * NR, D, tile.n, dx + tile.i0 * D, D);
  if (dy) multiply_add<1, TILE_LD>(tile.s, tile.n, x_slices, tile.m * NR, D, tile.m, dy + tile.j0 * D, D);
}

// A scalar chain in the order and with the rounding of the micro-kernel.
static inline float chained(float a, float b, float c) {
#if VLMFAST_ISA_ID == VLMFAST_SCALAR
  return a * b + c;
#else
  return __builtin_fmaf(a, b, c);
#endif
}

void dots(const Pair& pair, const float* x_inverse, const float* y_inverse, const int64_t* x_rows,
          const int64_t* y_rows, int64_t count, float* out) {
  constexpr int64_t LANES = 8;  // independent chains hide the latency of one
  typed(pair.x, [&](auto* x) {
    typed(pair.y, [&](auto* y) {
      for (int64_t p = 0; p < count; p += LANES) {
        const int64_t lanes = count - p < LANES ? count - p : LANES;
        float total[LANES] = {};
        for (int64_t k = 0; k < pair.D; ++k)
          for (int64_t l = 0; l < lanes; ++l) {
            const int64_t i = x_rows[p + l], j = y_rows[p + l];
            total[l] = chained(to_float(x[i * pair.D + k]) * x_inverse[i], to_float(y[j * pair.D + k]) * y_inverse[j],
                               total[l]);
          }
        for (int64_t l = 0; l < lanes; ++l) out[p + l] = total[l];
      }
    });
  });
}

void finish_gradient(const Matrix& x, int64_t D, const float* inverse, bool normalize, float scale, int64_t begin,
                     int64_t end, float* H, double* dots) {
  typed(x, [&](auto* data) {
    for (int64_t i = begin; i < end; ++i) {
      auto* row = data + i * D;
      float* h = H + i * D;
      double parts[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      int64_t k = 0;
      for (; k + 8 <= D; k += 8)
        for (int64_t l = 0; l < 8; ++l) parts[l] += double(to_float(row[k + l])) * h[k + l];
      for (; k < D; ++k) parts[0] += double(to_float(row[k])) * h[k];
      double dot = 0;
      for (double part : parts) dot += part;
      dots[i] = dot * inverse[i];
      // d(x / |x|) = (I - u u^T) / |x|; a length below the clamp is a constant divisor.
      const bool project = normalize && inverse[i] < 1e12f;
      const float along = project ? float(dots[i] * inverse[i]) : 0.0f, factor = scale * inverse[i];
      for (k = 0; k < D; ++k) h[k] = factor * (h[k] - to_float(row[k]) * along);
    }
  });
}

double flops_of_micro(int64_t D, int64_t repeats, const float* a, const float* b, float* c) {
  for (int64_t i = 0; i < repeats; ++i) micro<1, MR, CONTINUE>(D, a, b, c, NR);
  return 2.0 * double(MR * NR * D * repeats);
}

}  // namespace VLMFAST_ISA
}  // namespace vlmfast
