// What retrieval asks of a tile of S: the k best of each row, and how many are better than the right one.
#include "cpu/tile.h"

namespace vlmfast {
namespace VLMFAST_ISA {

// A row's k best as a heap with the worst on top. NaN is above every number, as in torch.sort; of equals the higher
// index is the worse.
static inline bool worse(float a, int64_t i, float b, int64_t j) {
  const bool equal = a == b || (a != a && b != b);
  return equal ? i > j : a < b || b != b;
}

static void sift_down(float* values, int64_t* indices, int64_t at, int64_t size) {
  const float value = values[at];
  const int64_t index = indices[at];
  for (int64_t child; (child = 2 * at + 1) < size; at = child) {
    if (child + 1 < size && worse(values[child + 1], indices[child + 1], values[child], indices[child])) ++child;
    if (!worse(values[child], indices[child], value, index)) break;
    values[at] = values[child];
    indices[at] = indices[child];
  }
  values[at] = value;
  indices[at] = index;
}

void topk(const Tile& tile, int64_t k, float* values, int64_t* indices) {
  for (int64_t i = 0; i < tile.m; ++i) {
    float* value = values + (tile.i0 + i) * k;
    int64_t* index = indices + (tile.i0 + i) * k;
    for (int64_t j = 0; j < tile.n; j += W) {
      const float* s = tile.s + i * TILE_LD + j;
      const bool full = index[0] != INT64_MAX;
      if (full && count(both(first(tile.n - j), le(load(s), set1(value[0])))) == count(first(tile.n - j))) continue;
      for (int64_t l = 0; l < W && j + l < tile.n; ++l)
        if (worse(value[0], index[0], s[l], tile.j0 + j + l)) {
          value[0] = s[l];
          index[0] = tile.j0 + j + l;
          sift_down(value, index, 0, k);
        }
    }
  }
}

// Heap to list, best first.
void topk_sort(int64_t k, float* values, int64_t* indices) {
  for (int64_t size = k - 1; size > 0; --size) {
    const float value = values[0];
    const int64_t index = indices[0];
    values[0] = values[size];
    indices[0] = indices[size];
    values[size] = value;
    indices[size] = index;
    sift_down(values, indices, 0, size);
  }
}

void rank(const Tile& tile, const float* best, int64_t* above, int64_t* ties) {
  for (int64_t i = 0; i < tile.m; ++i) {
    const V mark = set1(best[tile.i0 + i]);
    for (int64_t j = 0; j < tile.n; j += W) {
      const V z = load(tile.s + i * TILE_LD + j);
      const Mask inside = first(tile.n - j);
      above[tile.i0 + i] += count(inside) - count(both(inside, le(z, mark)));  // not "greater": NaN counts as above
      ties[tile.i0 + i] += count(both(inside, eq(z, mark)));
    }
  }
}

}  // namespace VLMFAST_ISA
}  // namespace vlmfast
