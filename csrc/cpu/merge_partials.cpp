#include <algorithm>
#include <cmath>
#include <limits>

#include "../launch.h"

namespace pikv_ds {
namespace {

// Fewer elements than this are merged faster by one thread than others are woken.
constexpr int64_t kParallelElements = int64_t{1} << 17;
constexpr float kEmptyLse = -std::numeric_limits<float>::infinity();

// The largest lse of a row, the shift that keeps exp() in range. A NaN compares false and is left
// out here; it still reaches the result through its own weight.
float MaxLse(const MergePartialsParams& p, int64_t row) {
  float max_lse = kEmptyLse;
  for (int64_t partial = 0; partial < p.num_partials; ++partial) {
    const float lse = p.lses[partial * p.num_rows + row];
    if (lse > max_lse) max_lse = lse;
  }
  return max_lse;
}

void MergeRow(const MergePartialsParams& p, int64_t row) {
  float* __restrict__ out = p.out + row * p.head_dim;
  std::fill_n(out, p.head_dim, 0.0f);

  const float max_lse = MaxLse(p, row);
  float weight_sum = 0.0f;
  // Always 0..P-1: a fixed order of summation makes the result the same bits on every run.
  for (int64_t partial = 0; partial < p.num_partials; ++partial) {
    const float lse = p.lses[partial * p.num_rows + row];
    // Skipped rather than given weight zero: the out of an empty partial may be uninitialised, and
    // 0 * NaN is NaN. It also keeps exp(-inf - -inf) = NaN away from rows that are empty all over.
    if (lse == kEmptyLse) continue;
    const float weight = std::exp(lse - max_lse);
    weight_sum += weight;
    const float* __restrict__ partial_out = p.outs + (partial * p.num_rows + row) * p.head_dim;
    for (int64_t d = 0; d < p.head_dim; ++d) out[d] += weight * partial_out[d];
  }

  // The partial that holds the maximum weighs exactly 1, so the sum is zero only without partials.
  // A NaN lse made the sum NaN, which is not equal to zero and so spreads to out and lse below.
  if (weight_sum == 0.0f) {
    p.lse[row] = kEmptyLse;
    return;
  }
  for (int64_t d = 0; d < p.head_dim; ++d) out[d] /= weight_sum;
  p.lse[row] = max_lse + std::log(weight_sum);
}

}  // namespace

void MergePartialsCpu(const MergePartialsParams& params) {
  const int64_t num_elements = params.num_partials * params.num_rows * params.head_dim;
#pragma omp parallel for schedule(static) if (num_elements >= kParallelElements)
  for (int64_t row = 0; row < params.num_rows; ++row) MergeRow(params, row);
}

}  // namespace pikv_ds
