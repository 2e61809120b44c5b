// Addresses and sizes from Python to the kernels, with the interpreter's lock released while they run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "vlmfast/kernels.h"

namespace py = pybind11;
using namespace vlmfast;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, rows, dtype) of one matrix, as Python hands it over.
using MatrixArg = std::tuple<uintptr_t, int64_t, int32_t>;
// (ids, weight, share, lse, positive_lse): addresses, 0 for what is absent.
using SideArg = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

Matrix matrix(const MatrixArg& arg) {
  const auto& [address, rows, dtype] = arg;
  if (!address || rows < 1) throw std::invalid_argument("a matrix needs an address and at least one row");
  if (dtype < FLOAT32 || dtype > FLOAT16)
    throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  return {at<const void>(address), rows, dtype};
}

Pair pair(const MatrixArg& x, const MatrixArg& y, int64_t D, bool normalize, int threads) {
  if (D < 1) throw std::invalid_argument("the width D must be at least 1");
  return {matrix(x), matrix(y), D, normalize, threads};
}

SoftmaxSide side(const SideArg& arg) {
  const auto& [ids, weight, share, lse, positive_lse] = arg;
  return {at<const int32_t>(ids), at<const float>(weight), at<const float>(share), at<double>(lse),
          at<double>(positive_lse)};
}

SoftmaxCall softmax_call(const MatrixArg& x, const MatrixArg& y, int64_t D, bool normalize, int threads,
                         const SideArg& rows, const SideArg& cols, float scale, float smoothing, int32_t form) {
  if (form < INDEX || form > IN) throw std::invalid_argument("form must be 0 (index), 1 (out) or 2 (in)");
  return {pair(x, y, D, normalize, threads), side(rows), side(cols), scale, smoothing, form};
}

// (address, dtype, 8 sizes, 8 strides) of a view of patches, and the addresses of scale and shift.
using PatchesArg = std::tuple<uintptr_t, int32_t, std::array<int64_t, 8>, std::array<int64_t, 8>, uintptr_t, uintptr_t>;

PatchCall patch_call(const PatchesArg& arg, int64_t H, int64_t lead, int threads) {
  const auto& [address, dtype, size, stride, scale, shift] = arg;
  if (dtype != FLOAT32 && dtype != UINT8) throw std::invalid_argument("dtype must be 0 (float32) or 3 (uint8)");
  PatchCall call = {at<const void>(address), dtype, {},   {},     at<const float>(scale),
                    at<const float>(shift),  H,     lead, threads};
  for (int d = 0; d < 8; ++d) {
    if (size[d] < 1) throw std::invalid_argument("patches must not be empty");
    call.size[d] = size[d];
    call.stride[d] = stride[d];
  }
  return call;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels; vlmfast.ops checks and allocates, these trust their arguments.";
  using Unlocked = py::call_guard<py::gil_scoped_release>;

  m.def(
      "softmax_loss_forward",
      [](const MatrixArg& x, const MatrixArg& y, int64_t D, bool normalize, int threads, const SideArg& rows,
         const SideArg& cols, float scale, float smoothing, int32_t form, uintptr_t kept) {
        return softmax_loss_forward(softmax_call(x, y, D, normalize, threads, rows, cols, scale, smoothing, form),
                                    at<float>(kept));
      },
      Unlocked());
  m.def(
      "softmax_loss_backward",
      [](const MatrixArg& x, const MatrixArg& y, int64_t D, bool normalize, int threads, const SideArg& rows,
         const SideArg& cols, float scale, float smoothing, int32_t form, uintptr_t kept, float grad, uintptr_t dx,
         uintptr_t dy) {
        return softmax_loss_backward(softmax_call(x, y, D, normalize, threads, rows, cols, scale, smoothing, form),
                                     grad, at<float>(kept), at<float>(dx), at<float>(dy));
      },
      Unlocked());
  m.def(
      "sigmoid_loss",
      [](const MatrixArg& x, const MatrixArg& y, int64_t D, bool normalize, int threads, int64_t offset, float scale,
         float bias, uintptr_t dx, uintptr_t dy) {
        double out[3];
        sigmoid_loss(pair(x, y, D, normalize, threads), offset, scale, bias, at<float>(dx), at<float>(dy), out);
        return std::make_tuple(out[0], out[1], out[2]);
      },
      Unlocked());
  m.def(
      "hinge_loss",
      [](const MatrixArg& x, const MatrixArg& y, int64_t D, bool normalize, int threads, float margin, bool hardest,
         uintptr_t dx, uintptr_t dy) {
        return hinge_loss(pair(x, y, D, normalize, threads), margin, hardest, at<float>(dx), at<float>(dy));
      },
      Unlocked());
  m.def(
      "similarity",
      [](const MatrixArg& x, const MatrixArg& y, int64_t D, bool normalize, int threads, uintptr_t out) {
        similarity(pair(x, y, D, normalize, threads), at<float>(out));
      },
      Unlocked());
  m.def(
      "similarity_topk",
      [](const MatrixArg& x, const MatrixArg& y, int64_t D, bool normalize, int threads, int64_t k, uintptr_t values,
         uintptr_t indices) {
        if (k < 1) throw std::invalid_argument("k must be at least 1");
        similarity_topk(pair(x, y, D, normalize, threads), k, at<float>(values), at<int64_t>(indices));
      },
      Unlocked());
  m.def(
      "rank_counts",
      [](const MatrixArg& x, const MatrixArg& y, int64_t D, bool normalize, int threads, uintptr_t positives, int64_t P,
         uintptr_t above, uintptr_t ties) {
        rank_counts(pair(x, y, D, normalize, threads), at<const int64_t>(positives), P, at<int64_t>(above),
                    at<int64_t>(ties));
      },
      Unlocked());

  m.def(
      "linear_cross_entropy",
      [](const MatrixArg& x, const MatrixArg& w, int64_t D, int threads, uintptr_t bias, uintptr_t labels,
         uintptr_t weight, float smoothing, float z_loss, int64_t workspace, bool known, uintptr_t losses,
         uintptr_t lse, uintptr_t dx, uintptr_t dw, uintptr_t dbias) {
        if (D < 1) throw std::invalid_argument("the width D must be at least 1");
        const VocabularyCall call = {matrix(x),
                                     matrix(w),
                                     D,
                                     at<const float>(bias),
                                     at<const int64_t>(labels),
                                     at<const float>(weight),
                                     smoothing,
                                     z_loss,
                                     workspace,
                                     threads};
        linear_cross_entropy(call, known, at<double>(losses), at<double>(lse), at<float>(dx), at<float>(dw),
                             at<float>(dbias));
      },
      Unlocked());

  m.def(
      "patch_embedding_forward",
      [](const PatchesArg& patches, int64_t H, int64_t lead, int threads, uintptr_t weight, uintptr_t bias,
         uintptr_t positions, uintptr_t tokens) {
        patch_embedding_forward(patch_call(patches, H, lead, threads), at<const float>(weight), at<const float>(bias),
                                at<const float>(positions), at<float>(tokens));
      },
      Unlocked());
  m.def(
      "patch_embedding_backward",
      [](const PatchesArg& patches, int64_t H, int64_t lead, int threads, uintptr_t grad, uintptr_t dweight) {
        patch_embedding_backward(patch_call(patches, H, lead, threads), at<const float>(grad), at<float>(dweight));
      },
      Unlocked());

  m.def("isa", &isa);
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const char* const* name = isas(); *name; ++name) names.emplace_back(*name);
    return names;
  });
  m.def(
      "force_isa",
      [](const std::optional<std::string>& name) {
        if (!force_isa(name ? name->c_str() : nullptr))
          throw std::invalid_argument("this build or processor has no instruction set '" + *name + "'");
      },
      py::arg("name").none(true));
  m.def("scratch_peak", &scratch_peak, py::arg("restart"));
  m.def("microkernel_gflops", &microkernel_gflops, py::arg("D"), py::arg("seconds"), Unlocked());
}
