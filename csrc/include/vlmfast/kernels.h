// Every CPU kernel, declared once. Pointers, sizes and numbers only: no torch, no Python, no STL in a signature.
//
// Letters: rows x [M, D], columns y [N, D], similarities S [M, N] = x y^T of the rows as they are, or of unit rows.
// Python checks and allocates; what is here trusts its arguments.
#pragma once
#include <stdint.h>

namespace vlmfast {

// S is walked in tiles of at most TILE_M x TILE_N. Their shape depends on M and N only, never on the threads, so
// neither do the bits of a result.
constexpr int64_t TILE_M = 192, TILE_N = 384;
constexpr int64_t TILE_LD = TILE_N + 16;  // a stride of 25 cache lines, so that a column of a tile meets every set

enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, UINT8 = 3 };

struct Matrix {
  const void* data;  // [rows, D], contiguous
  int64_t rows;
  int32_t dtype;
};

// What a call works on.
struct Pair {
  Matrix x, y;
  int64_t D;
  bool normalize;  // use x / max(|x|, 1e-12), likewise y
  int threads;
};

// One tile of S, rows [i0, i0 + m), columns [j0, j0 + n).
struct Tile {
  int64_t i0, j0, m, n;
  float* s;  // [TILE_M, TILE_LD]: dot products in, for a gradient dL/dS out; beyond m and n unspecified
};

// ---- softmax_loss -------------------------------------------------------------------------------------------------
// z = scale * S; row i's term is w_i (lse_i - target_i), columns likewise (docs/maths.md).

enum SoftmaxForm : int32_t {
  INDEX = 0,  // ids name the one positive: row_ids[i] a column, col_ids[j] a row, -1 none
  OUT = 1,    // positives are row_ids[i] == col_ids[j], target the mean of their z ("share" = 1 / count)
  IN = 2,     // the same positives, target the log-sum-exp of their z
};

struct SoftmaxSide {  // of length M for rows, N for columns
  const int32_t* ids;
  const float* weight;   // nullptr: this direction is absent
  const float* share;    // OUT only
  double* lse;           // out in forward, in for backward; natural log
  double* positive_lse;  // IN only
};

struct SoftmaxCall {
  Pair pair;
  SoftmaxSide rows, cols;
  float scale, smoothing;
  int32_t form;
};

// kept [M, N], or nullptr: S, written by the forward to spare the backward from computing it again.
double softmax_loss_forward(const SoftmaxCall& call, float* kept);
// dx [M, D], dy [N, D] float32 or nullptr when not needed; returns dL/dscale. `grad` is the incoming gradient.
double softmax_loss_backward(const SoftmaxCall& call, float grad, float* kept, float* dx, float* dy);

// ---- sigmoid_loss -------------------------------------------------------------------------------------------------
// (1 / M) sum_ij softplus(-+(scale S_ij + bias)), - where j = i + offset; writes {loss, dL/dscale, dL/dbias}.
void sigmoid_loss(const Pair& pair, int64_t offset, float scale, float bias, float* dx, float* dy, double* out);

// ---- hinge_loss ---------------------------------------------------------------------------------------------------
// Sums of [margin + S_ij - S_ii]+ and [margin + S_ij - S_jj]+ over j != i: all of them, or the hardest of each row
// and column. Returns the loss.
double hinge_loss(const Pair& pair, float margin, bool hardest, float* dx, float* dy);

// ---- similarity ---------------------------------------------------------------------------------------------------
void similarity(const Pair& pair, float* out);                                           // out [M, N]
void similarity_topk(const Pair& pair, int64_t k, float* values, int64_t* indices);      // both [M, k], best first
void rank_counts(const Pair& pair, const int64_t* positives, int64_t P, int64_t* above,  // positives [M, P], -1 none
                 int64_t* ties);

// ---- linear_cross_entropy -----------------------------------------------------------------------------------------
// Logits z [M, V] = x w^T + bias; row i's loss is lse_i - (1 - smoothing) z_i,label - smoothing mean_j z_ij + z_loss
// lse_i^2 (docs/maths.md).
struct VocabularyCall {
  Matrix x, w;  // [M, D], [V, D]
  int64_t D;
  const float* bias;      // [V] or nullptr
  const int64_t* labels;  // [M], each in [0, V)
  const float* weight;    // [M]: gradients are those of sum_i weight_i loss_i
  float smoothing, z_loss;
  int64_t workspace;  // bytes of logits held at one time
  int threads;
};

// Fills losses and lse [M], natural log; with `known`, lse comes from the caller and losses are not touched. dx [M, D],
// dw [V, D] and dbias [V] are nullptr where they are not needed.
void linear_cross_entropy(const VocabularyCall& call, bool known, double* losses, double* lse, float* dx, float* dw,
                          float* dbias);

// ---- patch_embedding ----------------------------------------------------------------------------------------------
// Patch n = (image, position) is a row of K = C t p q pixels x; it counts as x * scale[c] + shift[c]. Images come as a
// strided view, so that every layout is one: NCHW, NHWC, video, packed patches.
struct PatchCall {
  const void* pixels;  // float32 or uint8
  int32_t dtype;
  int64_t size[8], stride[8];  // images, grid of 3, channels C, patch of 3; strides in elements
  const float *scale, *shift;  // [C]
  int64_t H;                   // features of a token
  int64_t lead;                // tokens before the patches' own in each image of `tokens`, which are not touched
  int threads;
};
// tokens [images, lead + P, H] = weight [H, K] x + bias [H] + positions [lead + P, H]; the last two may be nullptr.
void patch_embedding_forward(const PatchCall& call, const float* weight, const float* bias, const float* positions,
                             float* tokens);
// dweight [H, K] from grad [images, lead + P, H].
void patch_embedding_backward(const PatchCall& call, const float* grad, float* dweight);

// ---- the machine --------------------------------------------------------------------------------------------------
const char* isa();                   // the instruction set in use
const char* const* isas();           // those that this build has and this processor runs, best first, nullptr-ended
bool force_isa(const char* name);    // false: not in isas(). nullptr: the best again
int64_t scratch_peak(bool restart);  // most bytes of scratch memory held at once since the last restart
double microkernel_gflops(int64_t D, double seconds);  // the micro-kernel alone, one thread, operands in cache

// ---- one instruction set's kernels, the rows of the table in dispatch.cpp
// ---------------------------------------------

// Running statistics of one side of the softmax: sum_j 2^(z log2(e)) = 2^reference * total.
struct Running {
  float* reference;
  double* total;
  float* positive_reference;  // IN only
  double* positive;           // INDEX, OUT: (sum over) positives of z log2(e); IN: their total
};

// What a tile of logits says of each of its rows, in base 2.
struct LogitParts {
  float *reference, *total;  // sum_j 2^z = 2^reference * total
  double* logits;            // sum_j z, where labels are smoothed
  double* target;            // the label's z, where the tile holds it
};

// Products of bytes, where the processor has them. A is panels [rows / 8][depth / 4][8 rows][4 of the depth] of pixels;
// B is one panel [depth / 4][3 digits][16 columns][4 of the depth], whose numbers are `unit` times their digits.
constexpr int64_t BYTE_ROWS = 8, BYTE_COLUMNS = 16, BYTE_DIGITS = 3;
constexpr int64_t BYTE_DEPTH = 65536;  // 255 * 127 times it fits int32

struct Bytes {
  // B from rows of w [rows <= 16, K], a column each, times their channel's scale; `bytes` is scratch, 48 (K + 3). Each
  // row's sum over channels of shift times its weights is added to `offsets`.
  void (*weight_digits)(const float* w, int64_t rows, int64_t K, const float* scale, const float* shift,
                        int64_t per_channel, int8_t* bytes, int8_t* out, float* unit, double* offsets);
  // B from 16 columns, `columns` of them real, of the rows at grad + at[n]; their sums are added to `sums`.
  void (*gradient_digits)(const float* grad, const int64_t* at, int64_t rows, int64_t columns, int8_t* out, float* unit,
                          double* sums);
  // Group `group` of A's depth from 4 rows x [4, ld] of K bytes, K a multiple of 16.
  void (*pack_columns)(const uint8_t* x, int64_t ld, int64_t group, int64_t groups, int64_t K, uint8_t* out);
  // out [8, 16] = A's panel times B.
  void (*products)(int64_t groups, const uint8_t* a, const int8_t* b, const float* unit, float* out);
  // out [columns <= 16, rows <= 16], rows `ld` apart, += factor [rows] times the transposed products of two panels.
  void (*add_products)(int64_t groups, const uint8_t* a, const int8_t* b, const float* unit, const float* factor,
                       int64_t rows, int64_t columns, float* out, int64_t ld);
};

struct Kernels {
  const char* name;
  const Bytes* bytes;  // nullptr where there is no such instruction
  int64_t mr, nr;      // panel widths

  // out[i] = 1 / max(|x_i|, 1e-12), or 1 for all.
  void (*inverse_lengths)(const Matrix& x, int64_t D, bool normalize, int64_t begin, int64_t end, float* out);
  // Rows [begin, begin + rows) scaled by `inverse`, as panels [k = D][width rows] / slices [k = rows][width columns].
  void (*pack_panels)(const Matrix& x, int64_t D, const float* inverse, int64_t begin, int64_t rows, int64_t width,
                      float* out);
  void (*pack_slices)(const Matrix& x, int64_t D, const float* inverse, int64_t begin, int64_t rows, int64_t width,
                      float* out);
  void (*similarity)(const float* x_panels, const float* y_panels, int64_t D, const Tile& tile);
  // dx += G y, dy += G^T x for the tile's G in tile.s.
  void (*accumulate)(const Tile& tile, const float* x_slices, const float* y_slices, int64_t D, float* dx, float* dy);
  // out[p] = the same bits that a tile gives for rows (x_rows[p], y_rows[p]).
  void (*dots)(const Pair& pair, const float* x_inverse, const float* y_inverse, const int64_t* x_rows,
               const int64_t* y_rows, int64_t count, float* out);
  // From H = sum_j G_ij y_j to the gradient of the raw row, in place; dots[i] = <x_i, H_i>.
  void (*finish_gradient)(const Matrix& x, int64_t D, const float* inverse, bool normalize, float scale, int64_t begin,
                          int64_t end, float* H, double* dots);

  void (*softmax_forward)(const Tile& tile, const SoftmaxCall& call, const Running& rows, const Running& cols);
  void (*softmax_backward)(const Tile& tile, const SoftmaxCall& call, float grad);
  void (*sigmoid)(const Tile& tile, int64_t offset, float scale, float bias, float weight, bool gradient,
                  double* row_loss, double* row_bias);
  void (*hinge_sum)(const Tile& tile, float margin, const float* diagonal, bool gradient, double* row_loss,
                    float* row_count, float* col_count);
  void (*hinge_hardest)(const Tile& tile, float* row_best, int64_t* row_arg, float* col_best, int64_t* col_arg);
  void (*topk)(const Tile& tile, int64_t k, float* values, int64_t* indices);
  void (*topk_sort)(int64_t k, float* values, int64_t* indices);
  void (*rank)(const Tile& tile, const float* best, int64_t* above, int64_t* ties);
  // Columns [column, column + columns) of rows [begin, begin + rows), as slices.
  void (*pack_columns)(const Matrix& x, int64_t D, int64_t column, int64_t columns, int64_t begin, int64_t rows,
                       int64_t width, float* out);
  // These columns of dx, from the first on, += G y.
  void (*accumulate_columns)(const Tile& tile, const float* y_slices, int64_t columns, int64_t D, float* dx);
  // S becomes z log2(e); `parts` begin at the tile's first row.
  void (*vocabulary_logits)(const Tile& tile, const VocabularyCall& call, const LogitParts& parts);
  // z log2(e) becomes dL/dz; dbias [V], or nullptr, += its columns' sums.
  void (*vocabulary_gradient)(const Tile& tile, const VocabularyCall& call, const double* lse, float* dbias);
  double (*flops_of_micro)(int64_t D, int64_t repeats, const float* a, const float* b, float* c);
};

}  // namespace vlmfast
