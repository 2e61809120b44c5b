#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/drive.h"

namespace vlmfast {

void similarity(const Pair& pair, float* out) {
  Sweep sweep(pair, nullptr, nullptr);
  const int64_t N = pair.y.rows;
  sweep.run([&](const Tile& tile) {
    for (int64_t i = 0; i < tile.m; ++i)
      std::memcpy(out + (tile.i0 + i) * N + tile.j0, tile.s + i * TILE_LD, size_t(tile.n) * sizeof(float));
  });
}

void similarity_topk(const Pair& pair, int64_t k, float* values, int64_t* indices) {
  const int64_t M = pair.x.rows;
  for (int64_t i = 0; i < M * k; ++i) values[i] = -INFINITY, indices[i] = INT64_MAX;
  Sweep sweep(pair, nullptr, nullptr);
  sweep.run([&](const Tile& tile) { kernels().topk(tile, k, values, indices); });
  for (int64_t i = 0; i < M; ++i) kernels().topk_sort(k, values + i * k, indices + i * k);
}

void rank_counts(const Pair& pair, const int64_t* positives, int64_t P, int64_t* above, int64_t* ties) {
  const int64_t M = pair.x.rows;
  Sweep sweep(pair, nullptr, nullptr);
  std::vector<int64_t> queries, items, own;
  for (int64_t i = 0; i < M; ++i) {
    own.assign(positives + i * P, positives + (i + 1) * P);
    std::sort(own.begin(), own.end());
    own.erase(std::unique(own.begin(), own.end()), own.end());  // an item named twice is one item
    for (int64_t item : own)
      if (item >= 0) queries.push_back(i), items.push_back(item);
  }
  std::vector<float> scores(queries.size());
  sweep.dots(queries.data(), items.data(), int64_t(queries.size()), scores.data());

  Scratch<float> best(M, -INFINITY);
  for (size_t p = 0; p < queries.size(); ++p)
    if (!(scores[p] <= best[queries[p]])) best[queries[p]] = scores[p];  // NaN wins: nothing compares with it
  for (int64_t i = 0; i < M; ++i) above[i] = ties[i] = 0;
  sweep.run([&](const Tile& tile) { kernels().rank(tile, best, above, ties); });
  for (size_t p = 0; p < queries.size(); ++p) ties[queries[p]] -= scores[p] == best[queries[p]];
}

}  // namespace vlmfast
