#include <cstring>

#include "cpu/drive.h"

namespace vlmfast {

namespace {

// The sizes of a call, and where patch n's pixels and token are.
struct Geometry {
  const PatchCall& call;
  int64_t P, N, L, K, C;  // patches an image and of all, pixels a channel and of all in a patch, channels

  explicit Geometry(const PatchCall& c)
      : call(c),
        P(c.size[1] * c.size[2] * c.size[3]),
        N(c.size[0] * P),
        L(c.size[5] * c.size[6] * c.size[7]),
        K(c.size[4] * L),
        C(c.size[4]) {}

  int64_t pixels_of(int64_t n) const {
    int64_t at = 0;
    for (int d = 3; d >= 0; --d) {
      at += n % call.size[d] * call.stride[d];
      n /= call.size[d];
    }
    return at;
  }
  int64_t position_of(int64_t n) const { return call.lead + n % P; }
  int64_t token_of(int64_t n) const { return (n / P * (call.lead + P) + position_of(n)) * call.H; }

  // f(channel, where the run begins among the patch's K, its first pixel) for each run of size[7] pixels.
  template <class T, class F>
  void runs(int64_t n, F f) const {
    const int64_t *size = call.size, *stride = call.stride;
    const T* patch = static_cast<const T*>(call.pixels) + pixels_of(n);
    int64_t k = 0;
    for (int64_t c = 0; c < size[4]; ++c)
      for (int64_t t = 0; t < size[5]; ++t)
        for (int64_t i = 0; i < size[6]; ++i, k += size[7])
          f(c, k, patch + c * stride[4] + t * stride[5] + i * stride[6]);
  }

  // Patch n as a row of bytes.
  void unfold(int64_t n, uint8_t* out) const {
    const int64_t width = call.size[7], step = call.stride[7];
    runs<uint8_t>(n, [&](int64_t, int64_t k, const uint8_t* x) {
      if (step == 1)
        std::memcpy(out + k, x, size_t(width));
      else
        for (int64_t j = 0; j < width; ++j) out[k + j] = x[j * step];
    });
  }

  // Patch n as a row of scaled and shifted floats.
  template <class T>
  void unfold_as(int64_t n, float* out) const {
    const int64_t width = call.size[7], step = call.stride[7];
    runs<T>(n, [&](int64_t c, int64_t k, const T* x) {
      const float scale = call.scale[c], shift = call.shift[c];
      for (int64_t j = 0; j < width; ++j) out[k + j] = float(x[j * step]) * scale + shift;
    });
  }
  void unfold(int64_t n, float* out) const {
    call.dtype == UINT8 ? unfold_as<uint8_t>(n, out) : unfold_as<float>(n, out);
  }

  bool in_bytes(int64_t depth) const { return kernels().bytes && call.dtype == UINT8 && depth <= BYTE_DEPTH; }

  // A thread costs some 50 us to start: give each at least 2^23 multiply-adds.
  int threads() const {
    const double most = double(N) * double(K) * double(call.H) / double(1 << 23);
    return most < 1 ? 1 : most < call.threads ? int(most) : call.threads;
  }

  // Patch n's token from column h0 on, `columns` numbers = sums + bias + position.
  void write(int64_t n, int64_t h0, int64_t columns, const float* sums, const float* bias, const float* positions,
             float* tokens) const {
    float* out = tokens + token_of(n) + h0;
    if (positions) {
      positions += position_of(n) * call.H + h0;
      for (int64_t c = 0; c < columns; ++c) out[c] = sums[c] + bias[c] + positions[c];
    } else {
      for (int64_t c = 0; c < columns; ++c) out[c] = sums[c] + bias[c];
    }
  }
};

// f(i) for i in [0, n), each on the thread that comes first; f may keep what make(thread) gave it.
template <class Make, class F>
void take_turns(int threads, int64_t n, Make make, F f) {
  std::atomic<int64_t> next{0};
  on_threads(threads < n ? threads : int(n), [&](int) {
    auto workspace = make();
    for (int64_t i; (i = next++) < n;) f(i, workspace);
  });
}

// Pixels are shifted and scaled as they are unfolded; the rest is the tile of any similarity.
void forward_in_floats(const Geometry& g, const float* weight, const float* bias, const float* positions,
                       float* tokens) {
  const Kernels& k = kernels();
  const int64_t H = g.call.H, K = g.K, M = TILE_M / 2;
  const int threads = g.threads();
  const Scratch<float> ones(H > k.mr ? H : k.mr, 1.0f), w(round_up(H, k.nr) * K);
  in_ranges(threads, H, TILE_N, [&](int64_t begin, int64_t end) {
    k.pack_panels({weight, H, FLOAT32}, K, ones, begin, end - begin, k.nr, w + begin * K);
  });
  struct Workspace {
    Scratch<float> rows, panels, s;
  };
  take_turns(
      threads, (g.N + M - 1) / M,
      [&] { return Workspace{Scratch<float>(k.mr * K), Scratch<float>(M * K), Scratch<float>(M * TILE_LD)}; },
      [&](int64_t block, const Workspace& space) {
        const int64_t n0 = block * M, m = g.N - n0 < M ? g.N - n0 : M;
        for (int64_t r0 = 0; r0 < m; r0 += k.mr) {
          const int64_t rows = m - r0 < k.mr ? m - r0 : k.mr;
          for (int64_t r = 0; r < rows; ++r) g.unfold(n0 + r0 + r, space.rows + r * K);
          k.pack_panels({space.rows, rows, FLOAT32}, K, ones, 0, rows, k.mr, space.panels + r0 * K);
        }
        for (int64_t h0 = 0; h0 < H; h0 += TILE_N) {
          const int64_t columns = H - h0 < TILE_N ? H - h0 : TILE_N;
          k.similarity(space.panels, w + h0 * K, K, {n0, h0, m, columns, space.s});
          for (int64_t r = 0; r < m; ++r)
            g.write(n0 + r, h0, columns, space.s + r * TILE_LD, bias + h0, positions, tokens);
        }
      });
}

// How many patches' bytes are held at once: few enough to be near, enough to make the other side's digits worth while.
int64_t chunk(const Geometry& g, int64_t bytes_of_patch, int64_t most) {
  const int64_t fit = (int64_t(1) << 24) / bytes_of_patch / BYTE_ROWS * BYTE_ROWS;
  const int64_t M = fit < most ? fit : most;
  return g.N < M ? g.N : M > BYTE_ROWS ? M : BYTE_ROWS;
}

// Scale and shift go into the weights and the bias, and the pixels are multiplied as they are.
void forward_in_bytes(const Geometry& g, const float* weight, const float* bias, const float* positions,
                      float* tokens) {
  const Bytes& bytes = *kernels().bytes;
  const int64_t H = g.call.H, K = g.K, groups = (K + 3) / 4, M = chunk(g, groups * 4, g.N);
  const int threads = g.threads();
  const Scratch<uint8_t> x(round_up(M, BYTE_ROWS) * groups * 4);
  for (int64_t n0 = 0; n0 < g.N; n0 += M) {
    const int64_t m = g.N - n0 < M ? g.N - n0 : M;
    in_ranges(threads, round_up(m, BYTE_ROWS), BYTE_ROWS, [&](int64_t begin, int64_t end) {
      const Scratch<uint8_t> row(groups * 4, 0);
      for (int64_t r = begin; r < end; ++r) {
        if (r < m) g.unfold(n0 + r, row);
        uint8_t* to = x + (r / BYTE_ROWS * groups * BYTE_ROWS + r % BYTE_ROWS) * 4;
        for (int64_t i = 0; i < groups; ++i) std::memcpy(to + i * BYTE_ROWS * 4, row + i * 4, 4);
      }
    });
    struct Workspace {
      Scratch<int8_t> digits, scratch;
    };
    const int64_t panel = groups * 4 * BYTE_DIGITS * BYTE_COLUMNS;
    take_turns(
        threads, (H + BYTE_COLUMNS - 1) / BYTE_COLUMNS,
        [&] { return Workspace{Scratch<int8_t>(panel), Scratch<int8_t>(panel)}; },
        [&](int64_t p, const Workspace& space) {
          const int64_t h0 = p * BYTE_COLUMNS, columns = H - h0 < BYTE_COLUMNS ? H - h0 : BYTE_COLUMNS;
          float unit[BYTE_COLUMNS], biases[BYTE_COLUMNS] = {};
          double offsets[BYTE_COLUMNS] = {};
          bytes.weight_digits(weight + h0 * K, columns, K, g.call.scale, g.call.shift, g.L, space.scratch, space.digits,
                              unit, offsets);
          for (int64_t c = 0; c < columns; ++c) biases[c] = float(offsets[c] + (bias ? double(bias[h0 + c]) : 0.0));
          for (int64_t r0 = 0; r0 < m; r0 += BYTE_ROWS) {
            const int64_t rows = m - r0 < BYTE_ROWS ? m - r0 : BYTE_ROWS;
            for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(tokens + g.token_of(n0 + r0 + r) + h0, 1);
            float sums[BYTE_ROWS * BYTE_COLUMNS];
            bytes.products(groups, x + r0 * groups * 4, space.digits, unit, sums);
            for (int64_t r = 0; r < rows; ++r)
              g.write(n0 + r0 + r, h0, columns, sums + r * BYTE_COLUMNS, biases, positions, tokens);
          }
        });
  }
}

// dweight += G^T x, rows of x a block at a time: every sum runs in the order of the patches.
void backward_in_floats(const Geometry& g, const float* grad, float* dweight) {
  const Kernels& k = kernels();
  const int64_t H = g.call.H, K = g.K, band = TILE_N / 4, slices = (K + k.nr - 1) / k.nr;
  const int threads = g.threads();
  const int64_t M = g.N < TILE_M ? g.N : TILE_M;
  const Scratch<float> x(slices * k.nr * M);
  std::memset(dweight, 0, size_t(H * K) * sizeof(float));
  for (int64_t n0 = 0; n0 < g.N; n0 += M) {
    const int64_t m = g.N - n0 < M ? g.N - n0 : M;
    in_ranges(threads, m, 1, [&](int64_t begin, int64_t end) {
      const Scratch<float> row(slices * k.nr, 0.0f);
      for (int64_t r = begin; r < end; ++r) {
        g.unfold(n0 + r, row);
        for (int64_t s = 0; s < slices; ++s)
          std::memcpy(x + (s * m + r) * k.nr, row + s * k.nr, size_t(k.nr) * sizeof(float));
      }
    });
    take_turns(
        threads, (H + band - 1) / band, [&] { return Scratch<float>(M * TILE_LD, 0.0f); },
        [&](int64_t task, const Scratch<float>& s) {
          const int64_t h0 = task * band, columns = H - h0 < band ? H - h0 : band;
          for (int64_t r = 0; r < m; ++r)
            std::memcpy(s + r * TILE_LD, grad + g.token_of(n0 + r) + h0, size_t(columns) * sizeof(float));
          k.accumulate({0, h0, m, columns, s}, x, nullptr, K, nullptr, dweight);
        });
  }
}

// x = pixel * scale + shift: the shift's part of dweight is shift * sum_n G_n, the scale's is exact products of bytes.
void backward_in_bytes(const Geometry& g, const float* grad, float* dweight) {
  const Bytes& bytes = *kernels().bytes;
  const int64_t H = g.call.H, K = g.K, Kp = round_up(K, 16), M = chunk(g, Kp, BYTE_DEPTH);
  const int64_t most_groups = (M + 3) / 4, panels = (H + BYTE_COLUMNS - 1) / BYTE_COLUMNS;
  const int threads = g.threads();
  const Scratch<uint8_t> x(Kp * most_groups * 4);
  const Scratch<int64_t> at(M);
  const Scratch<float> factor(Kp, 0.0f);
  for (int64_t k = 0; k < K; ++k) factor[k] = g.call.scale[k / g.L];
  for (int64_t n0 = 0; n0 < g.N; n0 += M) {
    const int64_t m = g.N - n0 < M ? g.N - n0 : M, groups = (m + 3) / 4;
    for (int64_t r = 0; r < m; ++r) at[r] = g.token_of(n0 + r);
    in_ranges(threads, groups, 1, [&](int64_t begin, int64_t end) {
      const Scratch<uint8_t> rows(4 * Kp, 0);
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t r = 0; r < 4; ++r)
          if (4 * i + r < m)
            g.unfold(n0 + 4 * i + r, rows + r * Kp);
          else
            std::memset(rows + r * Kp, 0, size_t(Kp));
        bytes.pack_columns(rows, Kp, i, groups, Kp, x);
      }
    });
    take_turns(
        threads, panels, [&] { return Scratch<int8_t>(groups * 4 * BYTE_DIGITS * BYTE_COLUMNS); },
        [&](int64_t p, const Scratch<int8_t>& digits) {
          const int64_t h0 = p * BYTE_COLUMNS, columns = H - h0 < BYTE_COLUMNS ? H - h0 : BYTE_COLUMNS;
          float unit[BYTE_COLUMNS];
          double totals[BYTE_COLUMNS] = {};
          bytes.gradient_digits(grad + h0, at, m, columns, digits, unit, totals);
          float* out = dweight + h0 * K;
          for (int64_t h = 0; h < columns; ++h)
            for (int64_t k = 0; k < K; k += g.L) {
              const float shift = float(double(g.call.shift[k / g.L]) * totals[h]);
              float* to = out + h * K + k;
              for (int64_t l = 0; l < g.L; ++l) to[l] = n0 == 0 ? shift : to[l] + shift;
            }
          for (int64_t k = 0; k < K; k += 16)
            bytes.add_products(groups, x + k * groups * 4, digits, unit, factor + k, K - k < 16 ? K - k : 16, columns,
                               out + k, K);
        });
  }
}

}  // namespace

void patch_embedding_forward(const PatchCall& call, const float* weight, const float* bias, const float* positions,
                             float* tokens) {
  const Geometry g(call);
  if (g.in_bytes(g.K)) return forward_in_bytes(g, weight, bias, positions, tokens);
  const Scratch<float> none(bias ? 0 : call.H, 0.0f);
  forward_in_floats(g, weight, bias ? bias : none, positions, tokens);
}

void patch_embedding_backward(const PatchCall& call, const float* grad, float* dweight) {
  const Geometry g(call);
  g.in_bytes(0) ? backward_in_bytes(g, grad, dweight) : backward_in_floats(g, grad, dweight);
}

}  // namespace vlmfast
