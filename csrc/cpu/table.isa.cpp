// This instruction set's row of the table in dispatch.cpp.
#include "cpu/tile.h"

namespace vlmfast {
namespace VLMFAST_ISA {

void inverse_lengths(const Matrix&, int64_t, bool, int64_t, int64_t, float*);
void pack_panels(const Matrix&, int64_t, const float*, int64_t, int64_t, int64_t, float*);
void pack_slices(const Matrix&, int64_t, const float*, int64_t, int64_t, int64_t, float*);
void similarity_tile(const float*, const float*, int64_t, const Tile&);
void accumulate(const Tile&, const float*, const float*, int64_t, float*, float*);
void dots(const Pair&, const float*, const float*, const int64_t*, const int64_t*, int64_t, float*);
void finish_gradient(const Matrix&, int64_t, const float*, bool, float, int64_t, int64_t, float*, double*);
void softmax_forward(const Tile&, const SoftmaxCall&, const Running&, const Running&);
void softmax_backward(const Tile&, const SoftmaxCall&, float);
void sigmoid(const Tile&, int64_t, float, float, float, bool, double*, double*);
void hinge_sum(const Tile&, float, const float*, bool, double*, float*, float*);
void hinge_hardest(const Tile&, float*, int64_t*, float*, int64_t*);
void topk(const Tile&, int64_t, float*, int64_t*);
void topk_sort(int64_t, float*, int64_t*);
void rank(const Tile&, const float*, int64_t*, int64_t*);
void pack_columns(const Matrix&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
void accumulate_columns(const Tile&, const float*, int64_t, int64_t, float*);
void vocabulary_logits(const Tile&, const VocabularyCall&, const LogitParts&);
void vocabulary_gradient(const Tile&, const VocabularyCall&, const double*, float*);
double flops_of_micro(int64_t, int64_t, const float*, const float*, float*);

#define VLMFAST_TEXT(x) #x
#define VLMFAST_NAME(x) VLMFAST_TEXT(x)
extern const Kernels table;
const Kernels table = {VLMFAST_NAME(VLMFAST_ISA),
                       nullptr,
                       MR,
                       NR,
                       inverse_lengths,
                       pack_panels,
                       pack_slices,
                       similarity_tile,
                       accumulate,
                       dots,
                       finish_gradient,
                       softmax_forward,
                       softmax_backward,
                       sigmoid,
                       hinge_sum,
                       hinge_hardest,
                       topk,
                       topk_sort,
                       rank,
                       pack_columns,
                       accumulate_columns,
                       vocabulary_logits,
                       vocabulary_gradient,
                       flops_of_micro};

}  // namespace VLMFAST_ISA
}  // namespace vlmfast
