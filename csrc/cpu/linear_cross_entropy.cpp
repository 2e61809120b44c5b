// The language-model head, some rows at a time, so that their logits fit a workspace. w is packed tile by tile as the
// rows pass over it. Each tile of dw, and each column of dx, is one thread's: sums are added in one order, and have the
// same bits, on any number of threads.
#include <cmath>
#include <cstring>

#include "cpu/drive.h"

namespace vlmfast {

static constexpr double LN2 = 0.6931471805599453;
// Rows at one time: with more, w is read less often, but then they leave the caches; with fewer, reading w takes longer
// than multiplying.
static constexpr int64_t MOST_ROWS = 504, FEW_ROWS = 192;

static int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Rows whose logits are held at one time, whole panels: as many as fit, but of many rows half, in chunks of nearly one
// size.
static int64_t chunk_of(const VocabularyCall& call, int64_t tiles, int64_t panel) {
  const int64_t M = call.x.rows, half = divide_up(M, 2);
  int64_t most = call.workspace / (tiles * TILE_LD * int64_t(sizeof(float)));
  if (most > MOST_ROWS) most = MOST_ROWS;
  if (most > FEW_ROWS && most > half) most = half > FEW_ROWS ? half : FEW_ROWS;
  most = most < panel ? panel : most / panel * panel;
  return round_up(divide_up(M, divide_up(M, most)), panel);
}

static int useful_threads(const VocabularyCall& call, int64_t tiles) {
  const double work = double(call.x.rows) * double(call.w.rows) * double(call.D) / double(1 << 23);
  const double most = double(call.threads < tiles ? call.threads : tiles);
  return work < 1 || most < 1 ? 1 : int(work < most ? work : most);
}

// Row i's loss and log-sum-exp from what the tiles say of it, in their order.
static void close(const VocabularyCall& call, const LogitParts& parts, int64_t tiles, int64_t stride, double* loss,
                  double* lse) {
  double reference = -INFINITY, total = 0, logits = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const double r = parts.reference[t * stride], sum = parts.total[t * stride];
    if (sum == 0) continue;
    if (r > reference) {
      total *= std::exp2(reference - r);
      reference = r;
    }
    total += sum * std::exp2(r - reference);
  }
  for (int64_t t = 0; call.smoothing != 0.0f && t < tiles; ++t) logits += parts.logits[t * stride];
  const double log_total = std::log2(total), smoothing = call.smoothing;
  *lse = (reference + log_total) * LN2;
  // reference - target first: both are near, and whole but for the target's fraction.
  const double term = (reference - (1 - smoothing) * *parts.target) + log_total;
  *loss = (term - smoothing * logits / double(call.w.rows)) * LN2 + double(call.z_loss) * *lse * *lse;
}

void linear_cross_entropy(const VocabularyCall& call, bool known, double* losses, double* lse, float* dx, float* dw,
                          float* dbias) {
  const Kernels& k = kernels();
  const int64_t M = call.x.rows, N = call.w.rows, D = call.D, tiles = divide_up(N, TILE_N);
  const bool gradient = dx || dw || dbias;
  const int threads = useful_threads(call, tiles);
  const int64_t rows = chunk_of(call, gradient ? tiles : threads, k.mr), width = round_up(D, k.nr);
  if (dx) std::memset(dx, 0, size_t(M * D) * sizeof(float));
  if (dbias) std::memset(dbias, 0, size_t(N) * sizeof(float));

  Scratch<float> ones(M > N ? M : N, 1.0f);
  Scratch<float> x_panels(rows * D), x_slices(dw ? rows * width : 0);
  Scratch<float> s((gradient ? tiles : threads) * rows * TILE_LD);
  Scratch<float> reference(tiles * rows), total(tiles * rows);
  Scratch<double> logits(call.smoothing != 0.0f ? tiles * rows : 0), target(rows);
  std::vector<Scratch<float>> packed;
  packed.reserve(threads);
  for (int t = 0; t < threads; ++t) packed.emplace_back(TILE_N * width);

  for (int64_t i0 = 0; i0 < M; i0 += rows) {
    const int64_t m = M - i0 < rows ? M - i0 : rows;
    const auto tile_of = [&](int64_t t, int64_t place) {
      const int64_t j0 = t * TILE_N;
      return Tile{i0, j0, m, N - j0 < TILE_N ? N - j0 : TILE_N, s + place * rows * TILE_LD};
    };
    const auto gradient_of = [&](const Tile& tile) {
      k.vocabulary_gradient(tile, call, lse, dbias);
      if (!dw) return;
      if (i0 == 0) std::memset(dw + tile.j0 * D, 0, size_t(tile.n * D) * sizeof(float));
      k.accumulate(tile, x_slices, nullptr, D, nullptr, dw);
    };
    k.pack_panels(call.x, D, ones, i0, m, k.mr, x_panels);
    if (dw) k.pack_columns(call.x, D, 0, D, i0, m, k.nr, x_slices);

    std::atomic<int64_t> next{0};
    on_threads(threads, [&](int thread) {
      for (int64_t t; (t = next++) < tiles;) {
        const Tile tile = tile_of(t, gradient ? t : thread);
        k.pack_panels(call.w, D, ones, tile.j0, tile.n, k.nr, packed[thread]);
        k.similarity(x_panels, packed[thread], D, tile);
        k.vocabulary_logits(tile, call, {reference + t * rows, total + t * rows, logits + t * rows, target});
        if (known) gradient_of(tile);
      }
    });
    if (!known)
      in_ranges(threads, m, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          close(call, {reference + i, total + i, logits + i, target + i}, tiles, rows, losses + i0 + i, lse + i0 + i);
      });
    if (!known && gradient) {
      next = 0;
      on_threads(threads, [&](int) {
        for (int64_t t; (t = next++) < tiles;) gradient_of(tile_of(t, t));
      });
    }
    if (dx)
      in_ranges(threads, D, k.nr, [&](int64_t begin, int64_t end) {
        Scratch<float> columns(TILE_N * round_up(end - begin, k.nr));
        for (int64_t t = 0; t < tiles; ++t) {
          const Tile tile = tile_of(t, t);
          k.pack_columns(call.w, D, begin, end - begin, tile.j0, tile.n, k.nr, columns);
          k.accumulate_columns(tile, columns, end - begin, D, dx + i0 * D + begin);
        }
      });
  }
}

}  // namespace vlmfast
