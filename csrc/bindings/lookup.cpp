// The ops of lookups: scores of pages from their summaries, and which pages are attended to.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../launch.h"
#include "checks.h"
#include "launch_kernel.h"

namespace pikv_ds {
namespace {

template <auto kKernel>
void PageScores(const Tensor& query, const Tensor& slab_pointers, int64_t slab_rows,
                int64_t row_bytes, const Tensor& table, const Tensor& counts,
                ScalarType bounds_dtype, int64_t num_kv_heads, Tensor out) {
  Args args("page_scores", Traits<kKernel>::kDevice, query);
  args.CheckDim("query", query, 3, "[R, H, D]");
  args.CheckDim("table", table, 2, "[R, P]");
  const int64_t r = query.size(0), h = query.size(1), d = query.size(2);
  const int64_t k = args.Int32("num_kv_heads", num_kv_heads, 1), width = table.size(1);
  const ScalarType dtype = query.scalar_type();

  PageScoresParams p{};
  args.CheckMultiple("query heads", h, "num_kv_heads", k);
  p.dtype = args.FloatingDtype("query", dtype);
  p.bounds_dtype = args.FloatingDtype("bounds_dtype", bounds_dtype);
  const int64_t bounds_bytes = 2 * k * d * (p.bounds_dtype == Dtype::kFloat32 ? 4 : 2);
  if (row_bytes < bounds_bytes) {
    args.Fail("summaries must have rows of at least bounds_bytes = ", bounds_bytes, ", got ",
              row_bytes);
  }
  p.summaries = args.SlabsOf(slab_pointers, slab_rows, row_bytes);
  p.query = args.In("query", query, {r, h, d}, "[R, H, D]", dtype);
  p.table = args.In<int32_t>("table", table, {r, width}, "[R, P]");
  p.counts = args.In<int32_t>("counts", counts, {r}, "[R]");
  p.out = args.Out<float>("out", out, {r, k, width}, "[R, K, P]");
  p.num_rows = r;
  p.num_heads = h;
  p.num_kv_heads = k;
  p.head_dim = d;
  p.table_width = width;
  Launch<kKernel>(p, args);
}

template <auto kKernel>
void SubpageScores(const Tensor& query, const Tensor& slab_pointers, int64_t slab_rows,
                   int64_t row_bytes, const Tensor& table, const Tensor& counts,
                   int64_t num_kv_heads, int64_t num_subpages, int64_t bits, double scale,
                   Tensor out) {
  Args args("subpage_scores", Traits<kKernel>::kDevice, query);
  args.CheckDim("query", query, 3, "[R, H, D]");
  args.CheckDim("table", table, 2, "[R, P]");
  const int64_t r = query.size(0), h = query.size(1), d = query.size(2);
  const int64_t k = args.Int32("num_kv_heads", num_kv_heads, 1), width = table.size(1);
  const int64_t count = args.Int32("num_subpages", num_subpages, 1);
  const ScalarType dtype = query.scalar_type();

  SubpageScoresParams p{};
  args.CheckMultiple("query heads", h, "num_kv_heads", k);
  p.dtype = args.FloatingDtype("query", dtype);
  if (bits != 4 && bits != 8) args.Fail("bits must be 4 or 8, got ", bits);
  if (d % (8 / bits) != 0) {
    args.Fail("head_dim must be a multiple of the ", 8 / bits, " codes in a byte, got ", d);
  }
  const int64_t summary_bytes = 2 * k * count * (d * bits / 8 + 2);
  if (row_bytes < summary_bytes) {
    args.Fail("summaries must have rows of at least summary_bytes = ", summary_bytes, ", got ",
              row_bytes);
  }
  p.summaries = args.SlabsOf(slab_pointers, slab_rows, row_bytes);
  p.query = args.In("query", query, {r, h, d}, "[R, H, D]", dtype);
  p.table = args.In<int32_t>("table", table, {r, width}, "[R, P]");
  p.counts = args.In<int32_t>("counts", counts, {r}, "[R]");
  p.out = args.Out<float>("out", out, {r, h, width}, "[R, H, P]");
  p.bits = static_cast<int32_t>(bits);
  p.scale = static_cast<float>(scale);
  p.num_rows = r;
  p.num_heads = h;
  p.num_kv_heads = k;
  p.head_dim = d;
  p.num_subpages = count;
  p.table_width = width;
  Launch<kKernel>(p, args);
}

template <auto kKernel>
void SelectPages(const Tensor& table, const Tensor& counts, const Tensor& scores,
                 const Tensor& pinned, const Tensor& budget, Tensor out) {
  Args args("select_pages", Traits<kKernel>::kDevice, scores);
  args.CheckDim("scores", scores, 3, "[R, K, P]");
  const int64_t r = scores.size(0), k = scores.size(1), width = scores.size(2);

  SelectPagesParams p{};
  p.table = args.In<int32_t>("table", table, {r, width}, "[R, P]");
  p.counts = args.In<int32_t>("counts", counts, {r}, "[R]");
  p.scores = args.In<float>("scores", scores, {r, k, width}, "[R, K, P]");
  p.pinned = args.In<bool>("pinned", pinned, {r, width}, "[R, P]");
  p.budget = args.In<int32_t>("budget", budget, {r}, "[R]");
  p.out = args.Out<int32_t>("out", out, {r, k, width}, "[R, K, P]");
  p.num_rows = r;
  p.num_kv_heads = k;
  p.table_width = width;
  Launch<kKernel>(p, args);
}

STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CPU, m) {
  m.impl("page_scores", TORCH_BOX(&PageScores<&PageScoresCpu>));
  m.impl("subpage_scores", TORCH_BOX(&SubpageScores<&SubpageScoresCpu>));
  m.impl("select_pages", TORCH_BOX(&SelectPages<&SelectPagesCpu>));
}

#if defined(PIKV_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CUDA, m) {
  m.impl("page_scores", TORCH_BOX(&PageScores<&PageScoresCuda>));
  m.impl("subpage_scores", TORCH_BOX(&SubpageScores<&SubpageScoresCuda>));
  m.impl("select_pages", TORCH_BOX(&SelectPages<&SelectPagesCuda>));
}
#endif

}  // namespace
}  // namespace pikv_ds
