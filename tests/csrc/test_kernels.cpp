// The kernels without Python, under the address and undefined-behaviour sanitizers (`make asan`): every instruction
// set, ragged shapes, exact buffer sizes, against double-precision loops; and the same bits on any number of threads.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "vlmfast/kernels.h"

using namespace vlmfast;
using std::vector;

namespace {

int failures = 0;

void check(bool ok, const char* what, int64_t M, int64_t N, int64_t D) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: isa %s, M=%lld N=%lld D=%lld\n", what, isa(), (long long)M, (long long)N, (long long)D);
}

vector<float> random_rows(int64_t rows, int64_t D, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  vector<float> x(size_t(rows * D));
  for (float& value : x) value = normal(generator);
  return x;
}

vector<double> unit(const vector<float>& x, int64_t D) {
  vector<double> u(x.begin(), x.end());
  for (size_t i = 0; i < u.size(); i += size_t(D)) {
    double square = 0;
    for (int64_t k = 0; k < D; ++k) square += u[i + k] * u[i + k];
    for (int64_t k = 0; k < D; ++k) u[i + k] /= std::sqrt(square);
  }
  return u;
}

vector<double> products(const vector<double>& x, const vector<double>& y, int64_t M, int64_t N, int64_t D) {
  vector<double> s(size_t(M * N), 0.0);
  for (int64_t i = 0; i < M; ++i)
    for (int64_t j = 0; j < N; ++j)
      for (int64_t k = 0; k < D; ++k) s[i * N + j] += x[i * D + k] * y[j * D + k];
  return s;
}

// dx as the kernels must give it: (I - u u^T) scale G v / |x|.
bool matches(const vector<float>& got, const vector<float>& x, const vector<double>& u, const vector<double>& v,
             const vector<double>& G, int64_t M, int64_t N, int64_t D, double scale, bool transposed) {
  double worst = 0, largest = 1e-30;
  for (int64_t i = 0; i < M; ++i) {
    vector<double> h(size_t(D), 0.0);
    double length = 0, along = 0;
    for (int64_t k = 0; k < D; ++k) length += double(x[i * D + k]) * x[i * D + k];
    for (int64_t j = 0; j < N; ++j)
      for (int64_t k = 0; k < D; ++k) h[k] += (transposed ? G[j * M + i] : G[i * N + j]) * v[j * D + k];
    for (int64_t k = 0; k < D; ++k) along += u[i * D + k] * h[k];
    for (int64_t k = 0; k < D; ++k) {
      const double exact = scale * (h[k] - u[i * D + k] * along) / std::sqrt(length);
      worst = std::max(worst, std::abs(exact - got[i * D + k]));
      largest = std::max(largest, std::abs(exact));
    }
  }
  return worst <= 2e-5 * std::max(largest, 1e-3);
}

// Adds one side's share of the loss, and its share of dL/dz to G: the other side is the same with z transposed.
double softmax_side(const vector<double>& z, int64_t M, int64_t N, bool transposed, const vector<int32_t>& ids,
                    const vector<int32_t>& other_ids, const vector<float>& weight, int form, double smoothing,
                    vector<double>& G) {
  double loss = 0;
  for (int64_t i = 0; i < M; ++i) {
    const auto at = [&](int64_t j) { return transposed ? j * M + i : i * N + j; };
    double top = -INFINITY, total = 0, inside = 0, target = 0, count = 0, mean = 0;
    const auto positive = [&](int64_t j) { return form == INDEX ? ids[i] == j : ids[i] == other_ids[j]; };
    for (int64_t j = 0; j < N; ++j) top = std::max(top, z[at(j)]), count += positive(j);
    for (int64_t j = 0; j < N; ++j) {
      total += std::exp(z[at(j)] - top);
      mean += z[at(j)] / double(N);
      if (positive(j)) inside += std::exp(z[at(j)] - top), target += z[at(j)] / count;
    }
    if (count == 0) continue;
    const double lse = top + std::log(total);
    loss += weight[i] * (form == IN ? std::log(total / inside) : lse - (1 - smoothing) * target - smoothing * mean);
    for (int64_t j = 0; j < N; ++j) {
      const double pull = form == IN ? std::exp(z[at(j)] - top) / inside : (1 - smoothing) / count;
      G[at(j)] += weight[i] * (std::exp(z[at(j)] - lse) - pull * positive(j) - smoothing / double(N));
    }
  }
  return loss;
}

// match: how much of y_i is x_i, for the even pairs; the others are strangers.
void softmax(int64_t M, int64_t N, int64_t D, float scale, float match, int form, bool rows, bool cols, float smoothing,
             bool need_x = true, bool need_y = true) {
  const vector<float> x = random_rows(M, D, 1);
  vector<float> y = random_rows(N, D, 2);
  for (int64_t i = 0; i < std::min(M, N); i += 2)
    for (int64_t k = 0; k < D; ++k) y[i * D + k] = match * x[i * D + k] + (1 - match) * y[i * D + k];
  const vector<double> u = unit(x, D), v = unit(y, D);
  vector<double> z = products(u, v, M, N, D);
  for (double& value : z) value *= scale;

  vector<int32_t> row_ids(size_t(M), -1), col_ids(size_t(N), -1);
  vector<float> row_weight(size_t(M), 0.0f), col_weight(size_t(N), 0.0f), row_share(size_t(M), 0.0f),
      col_share(size_t(N), 0.0f);
  for (int64_t i = 0; i < M; ++i) row_ids[i] = int32_t(form == INDEX ? (i < N ? i : -1) : i % 7);
  for (int64_t j = 0; j < N; ++j) col_ids[j] = int32_t(form == INDEX ? (j < M ? j : -1) : j % 9);
  const auto share = [&](int32_t id, const vector<int32_t>& others) {
    float count = 0;
    for (int32_t other : others) count += form == INDEX ? 0.0f : id == other;
    return form == INDEX ? float(id >= 0) : count > 0 ? 1 / count : 0.0f;
  };
  for (int64_t i = 0; i < M; ++i)
    row_share[i] = share(row_ids[i], col_ids), row_weight[i] = (row_share[i] > 0) / float(M);
  for (int64_t j = 0; j < N; ++j)
    col_share[j] = share(col_ids[j], row_ids), col_weight[j] = (col_share[j] > 0) / float(N);

  double loss = 0;
  vector<double> G(size_t(M * N), 0.0);
  if (rows) loss += softmax_side(z, M, N, false, row_ids, col_ids, row_weight, form, smoothing, G);
  if (cols) loss += softmax_side(z, N, M, true, col_ids, row_ids, col_weight, form, smoothing, G);

  vector<float> dx1, dy1;
  for (int threads : {1, 2, 5}) {
    vector<double> lse(size_t(2 * (M + N)), 0.0);
    vector<float> dx(size_t(need_x ? M * D : 0), NAN), dy(size_t(need_y ? N * D : 0), NAN);
    const SoftmaxCall call = {
        {{x.data(), M, FLOAT32}, {y.data(), N, FLOAT32}, D, true, threads},
        {row_ids.data(), rows ? row_weight.data() : nullptr, row_share.data(), &lse[0], &lse[M]},
        {col_ids.data(), cols ? col_weight.data() : nullptr, col_share.data(), &lse[2 * M], &lse[2 * M + N]},
        scale,
        smoothing,
        form};
    vector<float> S(size_t(threads == 5 ? 0 : M * N), NAN);  // with S kept, or computed again
    float* kept = S.empty() ? nullptr : S.data();
    const double got = softmax_loss_forward(call, kept);
    softmax_loss_backward(call, 1.0f, kept, need_x ? dx.data() : nullptr, need_y ? dy.data() : nullptr);
    check(std::abs(got - loss) <= 1e-5 * (1 + std::abs(loss)), "softmax loss", M, N, D);
    if (need_x) check(matches(dx, x, u, v, G, M, N, D, scale, false), "softmax dx", M, N, D);
    if (need_y) check(matches(dy, y, v, u, G, N, M, D, scale, true), "softmax dy", M, N, D);
    if (threads == 1) dx1 = dx, dy1 = dy;
    check(dx == dx1 && dy == dy1, "the same bits on any threads, S kept or not", M, N, D);
  }
}

void sigmoid(int64_t M, int64_t N, int64_t D, int64_t offset) {
  const vector<float> x = random_rows(M, D, 3), y = random_rows(N, D, 4);
  const vector<double> u = unit(x, D), v = unit(y, D), s = products(u, v, M, N, D);
  const Pair pair = {{x.data(), M, FLOAT32}, {y.data(), N, FLOAT32}, D, true, 2};
  vector<float> dx(size_t(M * D), NAN), dy(size_t(N * D), NAN);

  double loss = 0, tilt = 0, out[3];
  vector<double> G(size_t(M * N));
  for (int64_t i = 0; i < M; ++i)
    for (int64_t j = 0; j < N; ++j) {
      const double z = 10.0 * s[i * N + j] - 3.0, t = i + offset == j ? 1 : -1;
      loss += std::log1p(std::exp(-t * z)) / double(M);
      G[i * N + j] = -t / (1 + std::exp(t * z)) / double(M);
      tilt += G[i * N + j];
    }
  sigmoid_loss(pair, offset, 10.0f, -3.0f, dx.data(), dy.data(), out);
  check(std::abs(out[0] - loss) <= 1e-5 * loss, "sigmoid loss", M, N, D);
  check(std::abs(out[2] - tilt) <= 1e-5 * (1 + std::abs(tilt)), "sigmoid dbias", M, N, D);
  check(matches(dx, x, u, v, G, M, N, D, 10.0, false), "sigmoid dx", M, N, D);
  check(matches(dy, y, v, u, G, N, M, D, 10.0, true), "sigmoid dy", M, N, D);
}

void hinge(int64_t B, int64_t D) {
  const vector<float> x = random_rows(B, D, 3), y = random_rows(B, D, 4);
  const vector<double> s = products(unit(x, D), unit(y, D), B, B, D);
  const Pair pair = {{x.data(), B, FLOAT32}, {y.data(), B, FLOAT32}, D, true, 2};
  vector<float> dx(size_t(B * D), NAN), dy(size_t(B * D), NAN);

  for (bool hardest : {false, true}) {
    double expected = 0;
    for (int64_t i = 0; i < B; ++i) {
      double row = 0, col = 0;
      for (int64_t j = 0; j < B; ++j) {
        if (j == i) continue;
        const double by_row = std::max(0.0, 0.2 + s[i * B + j] - s[i * B + i]);
        const double by_col = std::max(0.0, 0.2 + s[j * B + i] - s[i * B + i]);
        row = hardest ? std::max(row, by_row) : row + by_row;
        col = hardest ? std::max(col, by_col) : col + by_col;
      }
      expected += row + col;
    }
    const double got = hinge_loss(pair, 0.2f, hardest, dx.data(), dy.data());
    check(std::abs(got - expected) <= 1e-5 * (1 + expected), hardest ? "hardest hinge" : "hinge", B, B, D);
    for (float value : dx) check(std::isfinite(value), "hinge dx written", B, B, D);
  }
}

void retrieval(int64_t M, int64_t N, int64_t D) {
  vector<float> x(size_t(M * D)), y(size_t(N * D));  // small integers: products are exact and ties abound
  std::mt19937 generator(5);
  for (float& value : x) value = float(int(generator() % 5) - 2);
  for (float& value : y) value = float(int(generator() % 5) - 2);
  const vector<double> s = products({x.begin(), x.end()}, {y.begin(), y.end()}, M, N, D);
  const Pair pair = {{x.data(), M, FLOAT32}, {y.data(), N, FLOAT32}, D, false, 2};
  const int64_t k = std::min<int64_t>(N, 7), P = 2;
  vector<float> out(size_t(M * N)), values(size_t(M * k));
  vector<int64_t> indices(size_t(M * k)), positives(size_t(M * P)), above(size_t(M), 0), ties(size_t(M), 0);
  for (int64_t i = 0; i < M; ++i) positives[i * P] = i % N, positives[i * P + 1] = i % 3 ? -1 : (i + 1) % N;

  similarity(pair, out.data());
  similarity_topk(pair, k, values.data(), indices.data());
  rank_counts(pair, positives.data(), P, above.data(), ties.data());
  vector<int64_t> none(size_t(M), -1), all(size_t(M), 0), no_ties(size_t(M), 0);
  rank_counts(pair, none.data(), 1, all.data(), no_ties.data());
  for (int64_t i = 0; i < M; ++i) check(all[i] == N && no_ties[i] == 0, "ranks without a positive", M, N, D);
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < N; ++j) check(out[i * N + j] == float(s[i * N + j]), "similarity", M, N, D);
    for (int64_t r = 0; r < k; ++r) {
      const int64_t j = indices[i * k + r];
      int64_t before = 0;
      for (int64_t l = 0; l < N; ++l) before += s[i * N + l] > s[i * N + j] || (s[i * N + l] == s[i * N + j] && l < j);
      check(before == r && values[i * k + r] == float(s[i * N + j]), "topk", M, N, D);
    }
    const int64_t p = positives[i * P], q = positives[i * P + 1];
    const double best = q < 0 ? s[i * N + p] : std::max(s[i * N + p], s[i * N + q]);
    int64_t over = 0, beside = 0;
    for (int64_t l = 0; l < N; ++l) {
      over += s[i * N + l] > best;
      beside += s[i * N + l] == best && l != p && l != q;
    }
    check(above[i] == over && ties[i] == beside, "ranks", M, N, D);
  }
}

// Rows few at a time and all at once, gradients from the forward and from its log-sum-exps, against double loops.
void linear_cross_entropy_of(int64_t M, int64_t N, int64_t D, bool with_bias, float smoothing, float z_loss) {
  const vector<float> x = random_rows(M, D, 1), w = random_rows(N, D, 2), c = random_rows(1, N, 3);
  const vector<double> xd(x.begin(), x.end()), wd(w.begin(), w.end());
  vector<int64_t> labels;
  vector<float> weight;
  for (int64_t i = 0; i < M; ++i) labels.push_back(i * 7 % N), weight.push_back(0.1f * float(1 + i % 3));
  vector<double> z = products(xd, wd, M, N, D), losses(size_t(M), 0.0), dx(size_t(M * D), 0.0), dw(size_t(N * D), 0.0),
                 dbias(size_t(N), 0.0);
  for (int64_t i = 0; i < M; ++i) {
    double total = 0, sum = 0;
    for (int64_t j = 0; j < N; ++j) {
      if (with_bias) z[i * N + j] += c[j];
      total += std::exp(z[i * N + j]), sum += z[i * N + j];
    }
    const double lse = std::log(total);
    losses[i] = lse - (1 - smoothing) * z[i * N + labels[i]] - smoothing * sum / double(N) + z_loss * lse * lse;
    for (int64_t j = 0; j < N; ++j) {
      const double g = weight[i] * ((1 + 2 * z_loss * lse) * std::exp(z[i * N + j] - lse) -
                                    (j == labels[i] ? 1 - smoothing : 0) - smoothing / double(N));
      dbias[j] += g;
      for (int64_t k = 0; k < D; ++k) dx[i * D + k] += g * w[j * D + k], dw[j * D + k] += g * x[i * D + k];
    }
  }
  const auto near = [&](const vector<float>& got, const vector<double>& exact, const char* what) {
    double worst = 0, largest = 1e-3;
    for (size_t i = 0; i < exact.size(); ++i) {
      worst = std::max(worst, std::abs(exact[i] - got[i]));
      largest = std::max(largest, std::abs(exact[i]));
    }
    check(worst <= 2e-5 * largest, what, M, N, D);  // a NaN that nobody wrote over is no maximum
    for (float value : got) check(std::isfinite(value), what, M, N, D);
  };
  for (int64_t workspace : {int64_t(0), int64_t(1) << 30})
    for (bool known : {false, true}) {
      vector<double> got(size_t(M), NAN), lse(size_t(M), NAN);
      VocabularyCall call = {{x.data(), M, FLOAT32},
                             {w.data(), N, FLOAT32},
                             D,
                             with_bias ? c.data() : nullptr,
                             labels.data(),
                             weight.data(),
                             smoothing,
                             z_loss,
                             workspace,
                             3};
      linear_cross_entropy(call, false, got.data(), lse.data(), nullptr, nullptr, nullptr);
      for (int64_t i = 0; i < M; ++i)
        check(std::abs(got[i] - losses[i]) <= 1e-5 * (1 + std::abs(losses[i])), "token losses", M, N, D);
      vector<float> a(size_t(M * D), NAN), b(size_t(N * D), NAN), e(size_t(N), NAN);
      linear_cross_entropy(call, known, known ? nullptr : got.data(), lse.data(), a.data(), b.data(), e.data());
      near(a, dx, "head dx"), near(b, dw, "head dw"), near(e, dbias, "head dbias");
    }
}

void halves() {  // bfloat16 and float16 inputs give what their float32 values give
  const int64_t B = 33, D = 20;
  const uint16_t bfloat16[4] = {0x3f80, 0xbf00, 0x4049, 0x3eaa}, float16[4] = {0x3c00, 0xb800, 0x4248, 0x0001};
  const float as_bfloat16[4] = {1.0f, -0.5f, 3.140625f, 0.33203125f};
  const float as_float16[4] = {1.0f, -0.5f, 3.140625f, 5.9604644775390625e-08f};
  for (int32_t dtype : {BFLOAT16, FLOAT16}) {
    vector<uint16_t> x(size_t(B * D));
    vector<float> wide(size_t(B * D)), got(size_t(B * B)), expected(size_t(B * B));
    std::mt19937 generator(6);
    for (size_t i = 0; i < x.size(); ++i) {
      const unsigned which = generator() % 4;
      x[i] = dtype == BFLOAT16 ? bfloat16[which] : float16[which];
      wide[i] = dtype == BFLOAT16 ? as_bfloat16[which] : as_float16[which];
    }
    similarity({{x.data(), B, dtype}, {x.data(), B, dtype}, D, true, 1}, got.data());
    similarity({{wide.data(), B, FLOAT32}, {wide.data(), B, FLOAT32}, D, true, 1}, expected.data());
    check(got == expected, dtype == BFLOAT16 ? "bfloat16" : "float16", B, B, D);
  }
}

// Images [B, C, H, W] of bytes, or the same as floats, `nhwc` in memory or not; tokens and dL/dweight of patches p x q.
void patch_embedding(int64_t B, int64_t C, int64_t GH, int64_t GW, int64_t p, int64_t q, int64_t D, int64_t lead,
                     bool bytes, bool nhwc, bool additions) {
  const int64_t H = GH * p, W = GW * q, P = GH * GW, K = C * p * q, N = B * P;
  std::mt19937 generator(7);
  vector<uint8_t> pixels(size_t(B * C * H * W));
  for (uint8_t& pixel : pixels) pixel = uint8_t(generator() % 3 ? generator() % 256 : 255);
  const vector<float> floats(pixels.begin(), pixels.end());
  const vector<float> weight = random_rows(D, K, 8), grad = random_rows(B * (lead + P), D, 9);
  const vector<float> bias = random_rows(1, D, 10), positions = random_rows(lead + P, D, 11);
  vector<float> scale(size_t(C), 0.0f), shift(size_t(C), 0.0f);
  for (int64_t c = 0; c < C; ++c) scale[c] = 0.01f + 0.002f * float(c), shift[c] = -1.0f - 0.1f * float(c);
  const int64_t w = nhwc ? C : 1, h = W * w, c = nhwc ? 1 : H * W;

  const auto x = [&](int64_t n, int64_t k) {
    const int64_t b = n / P, y = n % P / GW * p + k / q % p, column = n % GW * q + k % q, channel = k / (p * q);
    return double(pixels[b * C * H * W + channel * c + y * h + column * w]) * scale[channel] + shift[channel];
  };
  vector<double> tokens(size_t(N * D), 0.0), dweight(size_t(D * K), 0.0);
  double largest_grad = 0;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t d = 0; d < D; ++d) {
      const double g = grad[((n / P) * (lead + P) + lead + n % P) * D + d];
      for (int64_t k = 0; k < K; ++k) {
        tokens[n * D + d] += weight[d * K + k] * x(n, k);
        dweight[d * K + k] += g * x(n, k);
      }
      if (additions) tokens[n * D + d] += double(bias[d]) + positions[(lead + n % P) * D + d];
    }
  for (double value : dweight) largest_grad = std::max(largest_grad, std::abs(value));

  vector<float> first_tokens, first_dweight;
  for (int threads : {1, 2, 5}) {
    const PatchCall call = {bytes ? static_cast<const void*>(pixels.data()) : floats.data(),
                            bytes ? UINT8 : FLOAT32,
                            {B, 1, GH, GW, C, 1, p, q},
                            {B == 1 ? 0 : C * H * W, 0, p * h, q * w, c, 0, h, w},
                            scale.data(),
                            shift.data(),
                            D,
                            lead,
                            threads};
    vector<float> out(size_t(B * (lead + P) * D), 7.5f), dw(size_t(D * K), NAN);
    patch_embedding_forward(call, weight.data(), additions ? bias.data() : nullptr,
                            additions ? positions.data() : nullptr, out.data());
    patch_embedding_backward(call, grad.data(), dw.data());
    const double size = 4e-6 * double(K);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t d = 0; d < D; ++d) {
        const double got = out[((n / P) * (lead + P) + lead + n % P) * D + d];
        check(std::abs(got - tokens[n * D + d]) <= size, "patch tokens", N, D, K);
      }
    for (int64_t b = 0; b < B * lead; ++b)
      for (int64_t d = 0; d < D; ++d) check(out[b * (lead + P) * D + d] == 7.5f, "class token untouched", N, D, K);
    for (int64_t i = 0; i < D * K; ++i)
      check(std::abs(dw[i] - dweight[i]) <= 4e-6 * double(N) + 1e-6 * largest_grad, "patch dweight", N, D, K);
    if (threads == 1) first_tokens = out, first_dweight = dw;
    check(out == first_tokens && dw == first_dweight, "the same bits on any threads", N, D, K);
  }
}

}  // namespace

int main() {
  for (const char* const* name = isas(); *name; ++name) {
    force_isa(*name);
    // Alone; under, on and over a panel and a tile; ragged every way; more than one tile, and thread, each way.
    softmax(1, 1, 1, 14.3f, 0.5f, INDEX, true, true, 0.0f);
    softmax(12, 32, 7, 14.3f, 0.5f, INDEX, true, true, 0.1f);
    softmax(97, 96, 100, 100.0f, 0.9f, INDEX, true, true, 0.0f);
    softmax(400, 401, 8, 100.0f, 0.9f, INDEX, true, true, 0.0f);
    softmax(200, 385, 257, 14.3f, 0.5f, INDEX, true, true, 0.0f);
    for (int form : {INDEX, OUT, IN})
      for (int directions : {1, 2, 3}) {
        softmax(95, 193, 33, 14.3f, 0.5f, form, directions & 1, directions & 2, form == IN ? 0.0f : 0.2f);
        softmax(110, 210, 40, 100.0f, 0.95f, form, directions & 1, directions & 2, 0.0f, directions != 1,
                directions != 2);
      }
    sigmoid(1, 1, 3, 0);
    sigmoid(97, 97, 40, 0);
    sigmoid(210, 210, 31, 0);
    sigmoid(300, 300, 200, 0);  // enough for a second thread
    sigmoid(97, 401, 12, 300);  // pairs that begin in the second tile and run out of it
    sigmoid(210, 33, 12, -190);
    sigmoid(33, 97, 12, 97);  // no pair
    hinge(1, 3);
    hinge(97, 40);
    hinge(210, 31);
    hinge(300, 200);
    linear_cross_entropy_of(1, 1, 1, false, 0.0f, 0.0f);
    linear_cross_entropy_of(13, 385, 33, true, 0.1f, 0.01f);
    linear_cross_entropy_of(110, 900, 70, true, 0.0f, 0.0f);  // several threads and chunks
    linear_cross_entropy_of(25, 401, 20, false, 0.2f, 0.0f);
    retrieval(1, 1, 1);
    retrieval(100, 203, 9);
    retrieval(200, 600, 150);
    halves();
    for (bool bytes : {true, false}) {
      patch_embedding(1, 1, 1, 1, 1, 1, 1, 0, bytes, false, false);
      patch_embedding(2, 3, 3, 2, 7, 5, 17, 1, bytes, false, true);
      patch_embedding(3, 3, 5, 7, 4, 4, 33, 1, bytes, true, true);
      patch_embedding(1, 2, 11, 19, 16, 12, 401, 0, bytes, false, false);  // two tiles, and threads
      patch_embedding(1, 1, 300, 241, 1, 1, 1, 0, bytes, true, true);      // more patches than one chunk of bytes
    }
    std::printf("%s: %s\n", *name, failures ? "failed" : "passed");
  }
  check(!force_isa("no such set"), "force_isa refuses", 0, 0, 0);
  return failures != 0;
}
