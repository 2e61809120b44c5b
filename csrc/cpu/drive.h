// Threads, scratch memory, and the walk over the tiles of S that every family shares.
#pragma once
#include <atomic>
#include <cstddef>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "vlmfast/kernels.h"

namespace vlmfast {

const Kernels& kernels();  // the instruction set in use (dispatch.cpp)

// An uninitialised array, 64-byte aligned, counted in scratch_peak().
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : bytes_((size * int64_t(sizeof(T)) + 63) / 64 * 64 + 64), data_(allocate(bytes_)) {}
  Scratch(int64_t size, T value) : Scratch(size) {
    for (int64_t i = 0; i < size; ++i) data_[i] = value;
  }
  Scratch(Scratch&& other) noexcept : bytes_(other.bytes_), data_(other.data_) { other.data_ = nullptr; }
  Scratch(const Scratch&) = delete;
  ~Scratch();
  operator T*() const { return data_; }

 private:
  static T* allocate(int64_t bytes);
  int64_t bytes_;
  T* data_;
};

void count_scratch(int64_t bytes);

template <class T>
T* Scratch<T>::allocate(int64_t bytes) {
  T* data = static_cast<T*>(::operator new(size_t(bytes), std::align_val_t(64)));
  count_scratch(bytes);
  return data;
}

template <class T>
Scratch<T>::~Scratch() {
  if (!data_) return;
  count_scratch(-bytes_);
  ::operator delete(data_, std::align_val_t(64));
}

// Denormal floats count as zero while this lives: they are below every tolerance and slow by a factor of a hundred.
class FlushDenormals {
 public:
  FlushDenormals();
  ~FlushDenormals();

 private:
  unsigned before_;
};

// f(0), ..., f(threads - 1), each on its own thread as far as the system grants them, the rest on the caller's.
template <class F>
void on_threads(int threads, F f) {
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    while (int(others.size()) + 1 < threads)
      others.emplace_back([&f, t = int(others.size()) + 1] {
        FlushDenormals flush;
        f(t);
      });
  } catch (const std::system_error&) {
  }
  {
    FlushDenormals flush;
    f(0);
    for (int t = int(others.size()) + 1; t < threads; ++t) f(t);
  }
  for (std::thread& other : others) other.join();
}

// f(begin, end) over [0, n) cut into one range a thread, each beginning at a multiple of `step`.
template <class F>
void in_ranges(int threads, int64_t n, int64_t step, F f) {
  if (n == 0) return;
  const int64_t steps = (n + step - 1) / step;
  if (threads > steps) threads = int(steps);
  on_threads(threads, [&](int t) {
    const int64_t begin = steps * t / threads * step, end = steps * (t + 1) / threads * step;
    if (begin < n) f(begin, end < n ? end : n);
  });
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A pair of matrices, packed, ready to be walked tile by tile.
class Sweep {
 public:
  // kept [M, N], or nullptr: without dx and dy it is filled with S, with either of them S is read from it.
  Sweep(const Pair& pair, float* dx, float* dy, float* kept = nullptr);

  // f(tile) with tile.s filled, for every tile. A tile runs after those above it and those left of it, whatever the
  // threads: sums over rows or columns are added in one order and have the same bits on any number of threads.
  // Where dx or dy is given, f leaves G in tile.s and dx += G y, dy += G^T x follow (of unit rows, unscaled).
  template <class F>
  void run(F f);

  // From those sums to the gradients of the rows as they came; returns sum_i <x_i, (G y)_i>, which is dL/dscale.
  double finish(float scale);

  // out[p] = <x_i, y_j> for i = x_rows[p], j = y_rows[p], in the bits of the tiles.
  void dots(const int64_t* x_rows, const int64_t* y_rows, int64_t count, float* out) const;

  const float* x_inverse() const { return x_inverse_; }
  const float* y_inverse() const { return y_inverse_; }

 private:
  struct Workspace {
    Scratch<float> x_panels, x_slices, s;
  };

  void pack_y(int64_t j0, int64_t n);
  void copy_tile(const Tile& tile) const;                      // from or to `kept`
  int64_t at(int64_t j0) const { return streamed_ ? 0 : j0; }  // where the columns from j0 lie in the packed y

  Pair pair_;
  const Kernels& k_;
  float *dx_, *dy_, *kept_;
  bool again_;  // S is not in `kept`: it is computed
  int64_t tile_m_, tile_n_;
  bool streamed_;  // a single band of rows meets each column once: y is packed a tile at a time, in cache
  int threads_;
  Scratch<float> x_inverse_, y_inverse_, y_panels_, y_slices_;
};

template <class F>
void Sweep::run(F f) {
  const int64_t M = pair_.x.rows, N = pair_.y.rows, D = pair_.D;
  const int64_t bands = (M + tile_m_ - 1) / tile_m_;
  std::vector<std::atomic<int64_t>> done(bands);  // columns finished in each band of rows
  for (auto& d : done) d.store(0, std::memory_order_relaxed);
  std::atomic<int64_t> next{0};
  std::vector<Workspace> workspaces;
  workspaces.reserve(threads_);
  const int64_t rows = round_up(M < tile_m_ ? M : tile_m_, k_.mr);
  for (int t = 0; t < threads_; ++t)
    workspaces.push_back({Scratch<float>(rows * D), Scratch<float>(dy_ ? rows * round_up(D, k_.nr) : 0),
                          Scratch<float>(rows * TILE_LD, 0.0f)});

  on_threads(threads_, [&](int t) {
    const Workspace& w = workspaces[t];
    for (int64_t band; (band = next++) < bands;) {  // bands are taken in order, so the one above is never far
      const int64_t i0 = band * tile_m_, m = M - i0 < tile_m_ ? M - i0 : tile_m_;
      if (again_) k_.pack_panels(pair_.x, D, x_inverse_, i0, m, k_.mr, w.x_panels);
      if (dy_) k_.pack_slices(pair_.x, D, x_inverse_, i0, m, k_.nr, w.x_slices);
      for (int64_t j0 = 0; j0 < N; j0 += tile_n_) {
        const Tile tile = {i0, j0, m, N - j0 < tile_n_ ? N - j0 : tile_n_, w.s};
        if (streamed_) pack_y(j0, tile.n);
        if (again_) k_.similarity(w.x_panels, y_panels_ + at(j0) * D, D, tile);
        if (kept_) copy_tile(tile);
        if (band > 0)
          for (int spins = 0; done[band - 1].load(std::memory_order_acquire) < j0 + tile.n; ++spins)
            if (spins > 1000) std::this_thread::yield();
        f(tile);
        if (dx_ || dy_) k_.accumulate(tile, w.x_slices, y_slices_ + at(j0) * round_up(D, k_.nr), D, dx_, dy_);
        done[band].store(j0 + tile.n, std::memory_order_release);
      }
    }
  });
}

}  // namespace vlmfast
