// The ops of attention: over pages, over plain keys, and the merge of what they return.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../launch.h"
#include "checks.h"
#include "launch_kernel.h"

namespace pikv_ds {
namespace {

// What decode_attention and key_scores share.
DecodeAttentionParams DecodeParams(Args& args, const Tensor& query, const Tensor& slab_pointers,
                                   int64_t slab_rows, int64_t row_bytes, const Tensor& table,
                                   const Tensor& counts, int64_t element, int64_t num_kv_heads,
                                   int64_t page_size, int64_t latent_dim, double scale) {
  args.CheckDim("query", query, 3, "[R, H, D]");
  args.CheckDim("counts", counts, 1, "[B]");
  const int64_t r = query.size(0), h = query.size(1), d = query.size(2), b = counts.size(0);
  const ScalarType dtype = query.scalar_type();

  DecodeAttentionParams p{};
  p.layout = args.LayoutOf(element, num_kv_heads, page_size, d, latent_dim);
  args.CheckReadable(p.layout);
  args.CheckMultiple("query heads", h, "num_kv_heads", num_kv_heads);
  args.CheckMultiple("query rows", r, "table rows", b);
  p.slabs = args.PagesOf(slab_pointers, slab_rows, row_bytes, p.layout);
  p.dtype = args.FloatingDtype("query", dtype);
  p.query = args.In("query", query, {r, h, d}, "[R, H, D]", dtype);
  p.table_per_head = table.dim() == 3;
  if (p.table_per_head) {
    p.table_width = table.size(2);
    p.table = args.In<int32_t>("table", table, {b, num_kv_heads, p.table_width}, "[B, K, P]");
  } else {
    args.CheckDim("table", table, 2, "[B, P] or [B, K, P]");
    p.table_width = table.size(1);
    p.table = args.In<int32_t>("table", table, {b, p.table_width}, "[B, P]");
  }
  p.counts = args.In<int32_t>("counts", counts, {b}, "[B]");
  p.scale = static_cast<float>(scale);
  p.num_rows = r;
  p.num_table_rows = b;
  p.num_heads = h;
  return p;
}

template <auto kKernel>
void DecodeAttention(const Tensor& query, const Tensor& slab_pointers, int64_t slab_rows,
                     int64_t row_bytes, const Tensor& table, const Tensor& counts, int64_t element,
                     int64_t num_kv_heads, int64_t page_size, int64_t latent_dim, double scale,
                     Tensor out, Tensor lse, std::optional<Tensor> page_lse, int64_t num_splits,
                     std::optional<Tensor> scratch) {
  Args args("decode_attention", Traits<kKernel>::kDevice, query);
  DecodeAttentionParams p =
      DecodeParams(args, query, slab_pointers, slab_rows, row_bytes, table, counts, element,
                   num_kv_heads, page_size, latent_dim, scale);
  const int64_t r = p.num_rows, h = p.num_heads;
  p.out = args.Out<float>("out", out, {r, h, p.layout.ValueDim()}, "[R, H, V]");
  p.lse = args.Out<float>("lse", lse, {r, h}, "[R, H]");
  if (page_lse) {
    p.page_lse = args.Out<float>("page_lse", *page_lse, {r, h, p.table_width}, "[R, H, P]");
  }
  p.num_splits = args.Int32("num_splits", num_splits, 1);
#if defined(PIKV_WITH_CUDA)
  if constexpr (Traits<kKernel>::kDevice == Device::kCuda) {
    if (const int64_t floats = DecodeScratchFloats(p); floats > 0) {
      if (!scratch) args.Fail("scratch must have shape [floats] = [", floats, "], got None");
      p.scratch = args.Out<float>("scratch", *scratch, {floats}, "[floats]");
    }
  }
#endif
  Launch<kKernel>(p, args);
}

template <auto kKernel>
void KeyScores(const Tensor& query, const Tensor& slab_pointers, int64_t slab_rows,
               int64_t row_bytes, const Tensor& table, const Tensor& counts, int64_t element,
               int64_t num_kv_heads, int64_t page_size, int64_t latent_dim, double scale,
               Tensor out, int64_t num_splits) {
  Args args("key_scores", Traits<kKernel>::kDevice, query);
  DecodeAttentionParams p =
      DecodeParams(args, query, slab_pointers, slab_rows, row_bytes, table, counts, element,
                   num_kv_heads, page_size, latent_dim, scale);
  p.num_splits = args.Int32("num_splits", num_splits, 1);
  p.page_lse = args.Out<float>("out", out, {p.num_rows, p.num_heads, p.table_width}, "[R, H, P]");
  Launch<kKernel>(p, args);
}

template <auto kKernel>
void PrefillAttention(const Tensor& query, const Tensor& slab_pointers, int64_t slab_rows,
                      int64_t row_bytes, const Tensor& slots, int64_t element, int64_t num_kv_heads,
                      int64_t page_size, int64_t latent_dim, double scale, Tensor out, Tensor lse) {
  Args args("prefill_attention", Traits<kKernel>::kDevice, query);
  args.CheckDim("query", query, 3, "[T, H, D]");
  args.CheckDim("slots", slots, 1, "[P]");
  const int64_t t = query.size(0), h = query.size(1), d = query.size(2);
  const ScalarType dtype = query.scalar_type();

  PrefillAttentionParams p{};
  p.layout = args.LayoutOf(element, num_kv_heads, page_size, d, latent_dim);
  args.CheckReadable(p.layout);
  args.CheckMultiple("query heads", h, "num_kv_heads", num_kv_heads);
  p.slabs = args.PagesOf(slab_pointers, slab_rows, row_bytes, p.layout);
  p.dtype = args.FloatingDtype("query", dtype);
  p.query = args.In("query", query, {t, h, d}, "[T, H, D]", dtype);
  p.num_pages = slots.size(0);
  p.slots = args.In<int32_t>("slots", slots, {p.num_pages}, "[P]");
  p.out = args.Out<float>("out", out, {t, h, p.layout.ValueDim()}, "[T, H, V]");
  p.lse = args.Out<float>("lse", lse, {t, h}, "[T, H]");
  p.scale = static_cast<float>(scale);
  p.num_queries = t;
  p.num_heads = h;
  Launch<kKernel>(p, args);
}

template <auto kKernel>
void ContextAttention(const Tensor& query, const Tensor& keys, const Tensor& values, double scale,
                      std::optional<int64_t> first_query, Tensor out, Tensor lse) {
  Args args("context_attention", Traits<kKernel>::kDevice, query);
  args.CheckDim("query", query, 3, "[T, H, D]");
  args.CheckDim("keys", keys, 3, "[K, N, D]");
  const int64_t t = query.size(0), h = query.size(1), d = query.size(2);
  const int64_t k = keys.size(0), n = keys.size(1);
  const ScalarType dtype = query.scalar_type();

  ContextAttentionParams p{};
  args.CheckMultiple("query heads", h, "KV heads", k);
  if (first_query && *first_query < 0) {
    args.Fail("first_query must be at least 0 or None, got ", *first_query);
  }
  p.dtype = args.FloatingDtype("query", dtype);
  p.query = args.StridedIn("query", query, {t, h, d}, "[T, H, D]", dtype, p.query_strides);
  p.keys = args.StridedIn("keys", keys, {k, n, d}, "[K, N, D]", dtype, p.key_strides);
  p.value_dim = args.ValueDim(keys, values);
  p.values =
      args.StridedIn("values", values, {k, n, p.value_dim}, "[K, N, V]", dtype, p.value_strides);
  p.out = args.Out<float>("out", out, {t, h, p.value_dim}, "[T, H, V]");
  p.lse = args.Out<float>("lse", lse, {t, h}, "[T, H]");
  p.scale = static_cast<float>(scale);
  p.num_queries = t;
  p.num_heads = h;
  p.num_kv_heads = k;
  p.num_keys = n;
  p.head_dim = d;
  p.first_query = first_query.value_or(-1);
  Launch<kKernel>(p, args);
}

template <auto kKernel>
void TailAttention(const Tensor& query, const Tensor& keys, const Tensor& values,
                   const Tensor& lengths, double scale, Tensor out, Tensor lse) {
  Args args("tail_attention", Traits<kKernel>::kDevice, query);
  args.CheckDim("query", query, 3, "[N, H, D]");
  args.CheckDim("keys", keys, 4, "[N, K, S, D]");
  const int64_t n = query.size(0), h = query.size(1), d = query.size(2);
  const int64_t k = keys.size(1), s = keys.size(2);
  const ScalarType dtype = query.scalar_type();

  TailAttentionParams p{};
  args.CheckMultiple("query heads", h, "KV heads", k);
  p.dtype = args.FloatingDtype("query", dtype);
  p.query = args.In("query", query, {n, h, d}, "[N, H, D]", dtype);
  p.keys = args.In("keys", keys, {n, k, s, d}, "[N, K, S, D]", dtype);
  p.value_dim = args.ValueDim(keys, values);
  p.values =
      p.value_dim < d ? p.keys : args.In("values", values, {n, k, s, d}, "[N, K, S, D]", dtype);
  p.lengths = args.In<int32_t>("lengths", lengths, {n}, "[N]");
  p.out = args.Out<float>("out", out, {n, h, p.value_dim}, "[N, H, V]");
  p.lse = args.Out<float>("lse", lse, {n, h}, "[N, H]");
  p.scale = static_cast<float>(scale);
  p.num_rows = n;
  p.num_heads = h;
  p.num_kv_heads = k;
  p.page_size = s;
  p.head_dim = d;
  Launch<kKernel>(p, args);
}

template <auto kKernel>
void MergePartials(const Tensor& outs, const Tensor& lses, Tensor out, Tensor lse) {
  Args args("merge_partials", Traits<kKernel>::kDevice, outs);
  args.CheckDim("outs", outs, 3, "[P, N, D]");
  const int64_t num_partials = outs.size(0), n = outs.size(1), d = outs.size(2);

  MergePartialsParams p{};
  p.outs = args.In<float>("outs", outs, {num_partials, n, d}, "[P, N, D]");
  p.lses = args.In<float>("lses", lses, {num_partials, n}, "[P, N]");
  p.out = args.Out<float>("out", out, {n, d}, "[N, D]");
  p.lse = args.Out<float>("lse", lse, {n}, "[N]");
  p.num_partials = num_partials;
  p.num_rows = n;
  p.head_dim = d;
  Launch<kKernel>(p, args);
}

#if defined(PIKV_WITH_CUDA)
// Floats that decode_attention's scratch must have.
int64_t DecodeScratch(int64_t num_rows, int64_t num_heads, int64_t value_dim, int64_t num_splits) {
  float any;  // tells it from key_scores, which has no outputs to keep apart
  DecodeAttentionParams p{};
  p.out = &any;
  p.layout.head_dim = static_cast<int32_t>(value_dim);
  p.num_rows = num_rows;
  p.num_heads = num_heads;
  p.num_splits = num_splits;
  return DecodeScratchFloats(p);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&DecodeAttention<&DecodeAttentionCpu>));
  m.impl("key_scores", TORCH_BOX(&KeyScores<&DecodeAttentionCpu>));
  m.impl("prefill_attention", TORCH_BOX(&PrefillAttention<&PrefillAttentionCpu>));
  m.impl("context_attention", TORCH_BOX(&ContextAttention<&ContextAttentionCpu>));
  m.impl("tail_attention", TORCH_BOX(&TailAttention<&TailAttentionCpu>));
  m.impl("merge_partials", TORCH_BOX(&MergePartials<&MergePartialsCpu>));
}

#if defined(PIKV_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&DecodeAttention<&DecodeAttentionCuda>));
  m.impl("key_scores", TORCH_BOX(&KeyScores<&DecodeAttentionCuda>));
  m.impl("prefill_attention", TORCH_BOX(&PrefillAttention<&PrefillAttentionCuda>));
  m.impl("tail_attention", TORCH_BOX(&TailAttention<&TailAttentionCuda>));
  m.impl("merge_partials", TORCH_BOX(&MergePartials<&MergePartialsCuda>));
}

// Without tensors there is no device to choose a kernel by.
STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CompositeExplicitAutograd, m) {
  m.impl("decode_scratch_floats", TORCH_BOX(&DecodeScratch));
}
#endif

}  // namespace
}  // namespace pikv_ds
