#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../launch.h"
#include "narrow.h"

namespace pikv_ds {
namespace {

// Fewer elements than this are merged faster by one thread than others are woken.
constexpr int64_t kParallelElements = int64_t{1} << 17;
constexpr float kEmptyLse = -std::numeric_limits<float>::infinity();

// Where the partials of a head of a row are.
struct Place {
  const float* outs;
  const float* lses;
  int64_t out, lse;  // in out and lse
};

Place PlaceOf(const MergePartialsParams& p, int64_t head_of_row) {
  const int64_t row = head_of_row / p.num_heads, head = head_of_row % p.num_heads;
  return {p.outs + row * p.outs_strides[1] + head * p.head_dim,
          p.lses + row * p.lses_strides[1] + head, row * p.out_stride + head * p.head_dim,
          row * p.lse_stride + head};
}

// The largest lse, the shift that keeps exp() in range. A NaN compares false and is left out here;
// it still reaches the result through its own weight.
float MaxLse(const MergePartialsParams& p, const Place& place) {
  float max_lse = kEmptyLse;
  for (int64_t partial = 0; partial < p.num_partials; ++partial) {
    const float lse = place.lses[partial * p.lses_strides[0]];
    if (lse > max_lse) max_lse = lse;
  }
  return max_lse;
}

void Store(const MergePartialsParams& p, const float* __restrict__ sum, float divisor, int64_t at) {
  const int64_t size = p.head_dim;
  if (p.dtype == Dtype::kFloat32) {
    float* __restrict__ out = static_cast<float*>(p.out) + at;
    for (int64_t d = 0; d < size; ++d) out[d] = sum[d] / divisor;
    return;
  }
  uint16_t* __restrict__ out = static_cast<uint16_t*>(p.out) + at;
  const bool brain = p.dtype == Dtype::kBFloat16;
  for (int64_t d = 0; d < size; ++d) {
    out[d] = brain ? BFloat16Bits(sum[d] / divisor) : Float16Bits(sum[d] / divisor);
  }
}

void MergeRow(const MergePartialsParams& p, const Place& place, float* __restrict__ sum) {
  std::fill_n(sum, p.head_dim, 0.0f);
  const float max_lse = MaxLse(p, place);
  float weight_sum = 0.0f;
  // Always 0..P-1: a fixed order of summation makes the result the same bits on every run.
  for (int64_t partial = 0; partial < p.num_partials; ++partial) {
    const float lse = place.lses[partial * p.lses_strides[0]];
    // Skipped rather than given weight zero: the out of an empty partial may be uninitialised, and
    // 0 * NaN is NaN. It also keeps exp(-inf - -inf) = NaN away from rows that are empty all over.
    if (lse == kEmptyLse) continue;
    const float weight = std::exp(lse - max_lse);
    weight_sum += weight;
    const float* __restrict__ partial_out = place.outs + partial * p.outs_strides[0];
    for (int64_t d = 0; d < p.head_dim; ++d) sum[d] += weight * partial_out[d];
  }

  // The partial that holds the maximum weighs exactly 1, so the sum is zero only without partials.
  // A NaN lse made the sum NaN, which is not equal to zero and so spreads to out and lse below.
  const bool empty = weight_sum == 0.0f;
  Store(p, sum, empty ? 1.0f : weight_sum, place.out);
  if (p.lse != nullptr) p.lse[place.lse] = empty ? kEmptyLse : max_lse + std::log(weight_sum);
}

}  // namespace

void MergePartialsCpu(const MergePartialsParams& params) {
  const int64_t num_places = params.num_rows * params.num_heads;
  const int64_t num_elements = params.num_partials * num_places * params.head_dim;
#pragma omp parallel if (num_elements >= kParallelElements)
  {
    std::vector<float> sum(params.head_dim);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_places; ++i) MergeRow(params, PlaceOf(params, i), sum.data());
  }
}

}  // namespace pikv_ds
