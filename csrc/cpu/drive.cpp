#include "cpu/drive.h"

#include <chrono>
#include <cstring>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace vlmfast {

static std::atomic<int64_t> scratch_now{0}, scratch_most{0};

void count_scratch(int64_t bytes) {
  const int64_t now = scratch_now += bytes;
  for (int64_t most = scratch_most; now > most && !scratch_most.compare_exchange_weak(most, now);) {
  }
}

int64_t scratch_peak(bool restart) {
  const int64_t most = scratch_most;
  if (restart) scratch_most = scratch_now.load();
  return most;
}

#if defined(__SSE__)
FlushDenormals::FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
FlushDenormals::~FlushDenormals() { _mm_setcsr(before_); }
#else
FlushDenormals::FlushDenormals() : before_(0) {}
FlushDenormals::~FlushDenormals() { (void)before_; }
#endif

// Large tiles do fewer passes over what they add to; half of it where S would have too few tiles to share out.
static int64_t tile_size(int64_t n, int64_t most) { return n >= 16 * most ? most : most / 2; }

// A thread costs some 50 us to start: give each at least 2^23 multiply-adds, and a band of rows.
static int useful_threads(const Pair& pair, int64_t tile_m) {
  const double work = double(pair.x.rows) * double(pair.y.rows) * double(pair.D) / double(1 << 23);
  const int64_t bands = (pair.x.rows + tile_m - 1) / tile_m;
  const double most = double(pair.threads < bands ? pair.threads : bands);
  return work < 1 || most < 1 ? 1 : int(work < most ? work : most);
}

Sweep::Sweep(const Pair& pair, float* dx, float* dy, float* kept)
    : pair_(pair),
      k_(kernels()),
      dx_(dx),
      dy_(dy),
      kept_(kept),
      again_(!kept || !(dx || dy)),
      tile_m_(tile_size(pair.x.rows, TILE_M)),
      tile_n_(tile_size(pair.y.rows, TILE_N)),
      streamed_(pair.x.rows <= tile_m_),
      threads_(useful_threads(pair, tile_m_)),
      x_inverse_(pair.x.rows),
      y_inverse_(pair.y.rows),
      y_panels_(again_ ? round_up(streamed_ ? tile_n_ : pair.y.rows, k_.nr) * pair.D : 0),
      y_slices_(dx ? (streamed_ ? tile_n_ : pair.y.rows) * round_up(pair.D, k_.nr) : 0) {
  const int64_t M = pair.x.rows, N = pair.y.rows, D = pair.D;
  if (dx) std::memset(dx, 0, size_t(M * D) * sizeof(float));
  if (dy) std::memset(dy, 0, size_t(N * D) * sizeof(float));
  in_ranges(threads_, M, 1, [&](int64_t begin, int64_t end) {
    k_.inverse_lengths(pair_.x, D, pair_.normalize, begin, end, x_inverse_);
  });
  in_ranges(threads_, N, tile_n_, [&](int64_t begin, int64_t end) {
    k_.inverse_lengths(pair_.y, D, pair_.normalize, begin, end, y_inverse_);
    for (int64_t j0 = begin; j0 < end && !streamed_; j0 += tile_n_) pack_y(j0, end - j0 < tile_n_ ? end - j0 : tile_n_);
  });
}

void Sweep::pack_y(int64_t j0, int64_t n) {
  const int64_t D = pair_.D;
  if (again_) k_.pack_panels(pair_.y, D, y_inverse_, j0, n, k_.nr, y_panels_ + at(j0) * D);
  if (dx_) k_.pack_slices(pair_.y, D, y_inverse_, j0, n, k_.nr, y_slices_ + at(j0) * round_up(D, k_.nr));
}

void Sweep::copy_tile(const Tile& tile) const {
  for (int64_t i = 0; i < tile.m; ++i) {
    float *ours = tile.s + i * TILE_LD, *kept = kept_ + (tile.i0 + i) * pair_.y.rows + tile.j0;
    std::memcpy(again_ ? kept : ours, again_ ? ours : kept, size_t(tile.n) * sizeof(float));
  }
}

double Sweep::finish(float scale) {
  const int64_t M = pair_.x.rows, N = pair_.y.rows, D = pair_.D;
  Scratch<double> x_dots(M), y_dots(N);
  if (dx_)
    in_ranges(threads_, M, 1, [&](int64_t begin, int64_t end) {
      k_.finish_gradient(pair_.x, D, x_inverse_, pair_.normalize, scale, begin, end, dx_, x_dots);
    });
  if (dy_)
    in_ranges(threads_, N, 1, [&](int64_t begin, int64_t end) {
      k_.finish_gradient(pair_.y, D, y_inverse_, pair_.normalize, scale, begin, end, dy_, y_dots);
    });
  double total = 0;
  for (int64_t i = 0; dx_ && i < M; ++i) total += x_dots[i];
  for (int64_t j = 0; !dx_ && dy_ && j < N; ++j) total += y_dots[j];
  return total;
}

void Sweep::dots(const int64_t* x_rows, const int64_t* y_rows, int64_t count, float* out) const {
  in_ranges(threads_, count, 8, [&](int64_t begin, int64_t end) {
    k_.dots(pair_, x_inverse_, y_inverse_, x_rows + begin, y_rows + begin, end - begin, out + begin);
  });
}

double microkernel_gflops(int64_t D, double seconds) {
  const Kernels& k = kernels();
  Scratch<float> a(k.mr * D, 1.0f), b(k.nr * D, 1e-20f), c(k.mr * k.nr, 0.0f);
  double best = 0;
  const auto start = std::chrono::steady_clock::now();
  for (double elapsed = 0; elapsed < seconds;) {
    const auto before = std::chrono::steady_clock::now();
    const double flops = k.flops_of_micro(D, 500, a, b, c);
    const auto after = std::chrono::steady_clock::now();
    const double rate = flops / std::chrono::duration<double>(after - before).count() / 1e9;
    best = rate > best ? rate : best;
    elapsed = std::chrono::duration<double>(after - start).count();
  }
  return best;
}

}  // namespace vlmfast
