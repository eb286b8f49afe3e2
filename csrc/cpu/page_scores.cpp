#include <algorithm>
#include <limits>

#include "../launch.h"
#include "aligned_floats.h"

namespace pikv_ds {
namespace {

// Pages that are scored with one split of the query.
constexpr int64_t kBlock = 64;
// Score of what is not there.
constexpr float kMissing = -std::numeric_limits<float>::infinity();

// Scores pages [first, last) of a table row, at most kBlock, for all KV heads. `split` is memory
// for the query's parts: 2 * num_heads rows of head_dim, rounded up to whole vectors.
using ScoreBlockFunction = void(const PageScoresParams&, int64_t row, int64_t first, int64_t last,
                                float* split);

}  // namespace
}  // namespace pikv_ds

#define PIKV_KERNEL "page_scores_kernel.h"
#include "foreach_isa.h"

namespace pikv_ds {
namespace {

// Fewer than this are scored faster by one thread than others are woken.
constexpr int64_t kParallelElements = int64_t{1} << 17;

}  // namespace

void PageScoresCpu(const PageScoresParams& params) {
  const int64_t width = params.table_width;
  const int64_t blocks = (width + kBlock - 1) / kBlock, num_units = params.num_rows * blocks;
  const int lanes = BestLanes(params.head_dim);
  ScoreBlockFunction* const score = PIKV_BEST(lanes, ScoreBlockOf(params.bounds_dtype));
  const int64_t num_elements = params.num_rows * width * params.num_heads * params.head_dim;
#pragma omp parallel if (num_elements >= kParallelElements)
  {
    AlignedFloats split(2 * params.num_heads * (params.head_dim + kMaxLanes));
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < num_units; ++unit) {
      const int64_t row = unit / blocks, first = unit % blocks * kBlock;
      score(params, row, first, std::min(first + kBlock, width), split.data());
    }
  }
}

}  // namespace pikv_ds
