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

// What decode_attention and key_scores share; the lists are the caller's.
DecodeAttentionParams DecodeParams(Args& args, const Tensor& query, const Tensor& slab_pointers,
                                   int64_t slab_rows, int64_t row_bytes, int64_t num_lists,
                                   int64_t element, int64_t num_kv_heads, int64_t page_size,
                                   int64_t latent_dim, double scale) {
  args.CheckDim("query", query, 3, "[R, H, D]");
  const int64_t r = query.size(0), h = query.size(1), d = query.size(2), b = num_lists;
  const ScalarType dtype = query.scalar_type();

  DecodeAttentionParams p{};
  p.layout = args.LayoutOf(element, num_kv_heads, page_size, d, latent_dim);
  args.CheckReadable(p.layout);
  args.CheckMultiple("query heads", h, "num_kv_heads", num_kv_heads);
  args.CheckMultiple("query rows", r, "table rows", b);
  p.slabs = args.PagesOf(slab_pointers, slab_rows, row_bytes, p.layout);
  p.dtype = args.FloatingDtype("query", dtype);
  p.query = args.In("query", query, {r, h, d}, "[R, H, D]", dtype);
  p.scale = static_cast<float>(scale);
  p.num_rows = r;
  p.num_table_rows = b;
  p.num_heads = h;
  return p;
}

PageLists DenseLists(Args& args, const Tensor& table, const Tensor& counts, int64_t b,
                     int64_t num_kv_heads) {
  PageLists lists{};
  lists.per_head = table.dim() == 3;
  if (lists.per_head) {
    lists.width = table.size(2);
    lists.slots = args.In<int32_t>("table", table, {b, num_kv_heads, lists.width}, "[B, K, P]");
  } else {
    args.CheckDim("table", table, 2, "[B, P] or [B, K, P]");
    lists.width = table.size(1);
    lists.slots = args.In<int32_t>("table", table, {b, lists.width}, "[B, P]");
  }
  lists.counts = args.In<int32_t>("counts", counts, {b}, "[B]");
  return lists;
}

template <auto kKernel>
void LaunchDecode(Args& args, DecodeAttentionParams& p, Tensor& out, Tensor& lse,
                  int64_t num_splits, const std::optional<Tensor>& scratch) {
  const int64_t r = p.num_rows, h = p.num_heads;
  p.out =
      args.PartialOut<float>("out", out, {r, h, p.layout.ValueDim()}, "[R, H, V]", &p.out_stride);
  p.lse = args.PartialOut<float>("lse", lse, {r, h}, "[R, H]", &p.lse_stride);
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
void DecodeAttention(const Tensor& query, const Tensor& slab_pointers, int64_t slab_rows,
                     int64_t row_bytes, const Tensor& table, const Tensor& counts, int64_t element,
                     int64_t num_kv_heads, int64_t page_size, int64_t latent_dim, double scale,
                     Tensor out, Tensor lse, std::optional<Tensor> page_lse, int64_t num_splits,
                     std::optional<Tensor> scratch) {
  Args args("decode_attention", Traits<kKernel>::kDevice, query);
  args.CheckDim("counts", counts, 1, "[B]");
  const int64_t b = counts.size(0);
  DecodeAttentionParams p = DecodeParams(args, query, slab_pointers, slab_rows, row_bytes, b,
                                         element, num_kv_heads, page_size, latent_dim, scale);
  p.lists = DenseLists(args, table, counts, b, num_kv_heads);
  if (page_lse) {
    p.page_lse = args.Out<float>("page_lse", *page_lse, {p.num_rows, p.num_heads, p.lists.width},
                                 "[R, H, P]");
  }
  LaunchDecode<kKernel>(args, p, out, lse, num_splits, scratch);
}

template <auto kKernel>
void DecodeLists(const Tensor& query, const Tensor& slab_pointers, int64_t slab_rows,
                 int64_t row_bytes, const Tensor& slots, const Tensor& counts,
                 const Tensor& directory, const Tensor& directories, const Tensor& rows,
                 int64_t width, int64_t first, int64_t step, int64_t heads, int64_t element,
                 int64_t num_kv_heads, int64_t page_size, int64_t latent_dim, double scale,
                 Tensor out, Tensor lse, int64_t num_splits, std::optional<Tensor> scratch) {
  Args args("decode_lists", Traits<kKernel>::kDevice, query);
  args.CheckDim("rows", rows, 1, "[B / heads]");
  args.CheckDim("counts", counts, 2, "[rows, lists]");
  args.CheckDim("slots", slots, 1, "[segments * 32]");
  args.CheckDim("directory", directory, 1, "[N]");
  PageLists lists{};
  lists.heads = args.Int32("heads", heads, 1);
  const int64_t b = rows.size(0) * heads;
  DecodeAttentionParams p = DecodeParams(args, query, slab_pointers, slab_rows, row_bytes, b,
                                         element, num_kv_heads, page_size, latent_dim, scale);
  lists.slots = args.In<int32_t>("slots", slots, {slots.size(0)}, "[segments * 32]");
  lists.counts =
      args.In<int32_t>("counts", counts, {counts.size(0), counts.size(1)}, "[rows, lists]");
  lists.directory = args.In<int32_t>("directory", directory, {directory.size(0)}, "[N]");
  lists.directories =
      args.In<int32_t>("directories", directories, {counts.size(0), 2}, "[rows, 2]");
  lists.rows = args.In<int32_t>("rows", rows, {rows.size(0)}, "[B / heads]");
  lists.width = width;
  lists.num_lists = args.Int32("lists", counts.size(1), 1);
  lists.first = args.Int32("first", first, 0);
  lists.step = args.Int32("step", step, 1);
  if (first + (heads - 1) * step >= counts.size(1)) {
    args.Fail("first + (heads - 1) * step must be below lists = ", counts.size(1), ", got ",
              first + (heads - 1) * step);
  }
  p.lists = lists;
  LaunchDecode<kKernel>(args, p, out, lse, num_splits, scratch);
}

template <auto kKernel>
void KeyScores(const Tensor& query, const Tensor& slab_pointers, int64_t slab_rows,
               int64_t row_bytes, const Tensor& table, const Tensor& counts, int64_t element,
               int64_t num_kv_heads, int64_t page_size, int64_t latent_dim, double scale,
               Tensor out, int64_t num_splits) {
  Args args("key_scores", Traits<kKernel>::kDevice, query);
  args.CheckDim("counts", counts, 1, "[B]");
  const int64_t b = counts.size(0);
  DecodeAttentionParams p = DecodeParams(args, query, slab_pointers, slab_rows, row_bytes, b,
                                         element, num_kv_heads, page_size, latent_dim, scale);
  p.lists = DenseLists(args, table, counts, b, num_kv_heads);
  p.num_splits = args.Int32("num_splits", num_splits, 1);
  p.page_lse = args.Out<float>("out", out, {p.num_rows, p.num_heads, p.lists.width}, "[R, H, P]");
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
                   const Tensor& lengths, double scale, Tensor out, Tensor lse,
                   std::optional<Tensor> indices) {
  Args args("tail_attention", Traits<kKernel>::kDevice, query);
  args.CheckDim("query", query, 3, "[N, H, D]");
  args.CheckDim("keys", keys, 4, "[B, K, S, D]");
  const int64_t n = query.size(0), h = query.size(1), d = query.size(2);
  const int64_t b = indices ? keys.size(0) : n, k = keys.size(1), s = keys.size(2);
  const ScalarType dtype = query.scalar_type();

  TailAttentionParams p{};
  args.CheckMultiple("query heads", h, "KV heads", k);
  p.dtype = args.FloatingDtype("query", dtype);
  p.query = args.In("query", query, {n, h, d}, "[N, H, D]", dtype);
  p.keys = args.In("keys", keys, {b, k, s, d}, "[B, K, S, D]", dtype);
  p.value_dim = args.ValueDim(keys, values);
  p.values =
      p.value_dim < d ? p.keys : args.In("values", values, {b, k, s, d}, "[B, K, S, D]", dtype);
  if (indices) p.indices = args.In<int32_t>("indices", *indices, {n}, "[N]");
  p.lengths = args.In<int32_t>("lengths", lengths, {n}, "[N]");
  p.out = args.PartialOut<float>("out", out, {n, h, p.value_dim}, "[N, H, V]", &p.out_stride);
  p.lse = args.PartialOut<float>("lse", lse, {n, h}, "[N, H]", &p.lse_stride);
  p.scale = static_cast<float>(scale);
  p.num_rows = n;
  p.num_heads = h;
  p.num_kv_heads = k;
  p.page_size = s;
  p.head_dim = d;
  Launch<kKernel>(p, args);
}

template <auto kKernel>
void AppendTokens(const Tensor& keys, std::optional<Tensor> values, const Tensor& places,
                  Tensor tail_keys, std::optional<Tensor> tail_values, Tensor flags) {
  Args args("append_tokens", Traits<kKernel>::kDevice, keys);
  args.CheckDim("keys", keys, 3, "[N, K, D]");
  args.CheckDim("tail_keys", tail_keys, 4, "[B, K, S, D]");
  args.CheckDim("places", places, 2, "[3, M]");
  const int64_t n = keys.size(0), k = keys.size(1), d = keys.size(2);
  const int64_t b = tail_keys.size(0), s = tail_keys.size(2), m = places.size(1);
  const ScalarType dtype = keys.scalar_type();

  AppendTokensParams p{};
  p.dtype = args.FloatingDtype("keys", dtype);
  p.keys = args.StridedIn("keys", keys, {n, k, d}, "[N, K, D]", dtype, p.key_strides);
  p.places = args.In<int32_t>("places", places, {3, m}, "[3, M]");
  int64_t stride;
  p.tail_keys =
      args.PartialOut("tail_keys", tail_keys, {b, k, s, d}, "[B, K, S, D]", dtype, &stride);
  if (stride != k * s * d) args.Fail("tail_keys must be contiguous");
  if (values.has_value() != tail_values.has_value()) {
    args.Fail("values and tail_values must both be there, or neither");
  }
  if (values) {
    args.CheckDim("values", *values, 3, "[N, K, V]");
    p.value_dim = values->size(2);
    p.values =
        args.StridedIn("values", *values, {n, k, p.value_dim}, "[N, K, V]", dtype, p.value_strides);
    p.tail_values = args.PartialOut("tail_values", *tail_values, {b, k, s, p.value_dim},
                                    "[B, K, S, V]", dtype, &stride);
    if (stride != k * s * p.value_dim) args.Fail("tail_values must be contiguous");
  }
  p.flags = args.Out<int32_t>("flags", flags, {1}, "[1]");
  p.num_tokens = m;
  p.num_kv_heads = k;
  p.page_size = s;
  p.head_dim = d;
  Launch<kKernel>(p, args);
}

template <auto kKernel>
void AppendExperts(const Tensor& experts, const Tensor& places, Tensor tail_experts) {
  Args args("append_experts", Traits<kKernel>::kDevice, experts);
  args.CheckDim("experts", experts, 2, "[N, k]");
  args.CheckDim("places", places, 2, "[3, M]");
  args.CheckDim("tail_experts", tail_experts, 3, "[B, S, k]");
  const int64_t n = experts.size(0), k = experts.size(1), m = places.size(1);
  const int64_t b = tail_experts.size(0), s = tail_experts.size(1);
  const ScalarType dtype = experts.scalar_type();
  if (dtype != ScalarType::Long && dtype != ScalarType::Int && dtype != ScalarType::Short) {
    args.Fail("experts must be Long, Int or Short, got ", dtype);
  }

  AppendExpertsParams p{};
  p.experts = args.In("experts", experts, {n, k}, "[N, k]", dtype);
  p.expert_bytes = static_cast<int64_t>(experts.element_size());
  p.places = args.In<int32_t>("places", places, {3, m}, "[3, M]");
  p.tail_experts = args.Out<int16_t>("tail_experts", tail_experts, {b, s, k}, "[B, S, k]");
  p.num_tokens = m;
  p.page_size = s;
  p.top_k = k;
  Launch<kKernel>(p, args);
}

// Partials [P, N, D] are [P, N, 1, D].
template <auto kKernel>
void MergePartials(const Tensor& outs, const Tensor& lses, Tensor out, std::optional<Tensor> lse) {
  Args args("merge_partials", Traits<kKernel>::kDevice, outs);
  const bool heads = outs.dim() == 4;
  if (!heads) args.CheckDim("outs", outs, 3, "[P, N, D] or [P, N, H, D]");
  const int64_t num_partials = outs.size(0), n = outs.size(1), d = outs.size(outs.dim() - 1);
  const int64_t h = heads ? outs.size(2) : 1;
  const ScalarType dtype = out.scalar_type();

  MergePartialsParams p{};
  p.dtype = args.FloatingDtype("out", dtype);
  if (heads) {
    p.outs = args.PartialsIn("outs", outs, {num_partials, n, h, d}, "[P, N, H, D]", p.outs_strides);
    p.lses = args.PartialsIn("lses", lses, {num_partials, n, h}, "[P, N, H]", p.lses_strides);
    p.out = args.PartialOut("out", out, {n, h, d}, "[N, H, D]", dtype, &p.out_stride);
    if (lse) p.lse = args.PartialOut<float>("lse", *lse, {n, h}, "[N, H]", &p.lse_stride);
  } else {
    p.outs = args.PartialsIn("outs", outs, {num_partials, n, d}, "[P, N, D]", p.outs_strides);
    p.lses = args.PartialsIn("lses", lses, {num_partials, n}, "[P, N]", p.lses_strides);
    p.out = args.PartialOut("out", out, {n, d}, "[N, D]", dtype, &p.out_stride);
    if (lse) p.lse = args.PartialOut<float>("lse", *lse, {n}, "[N]", &p.lse_stride);
  }
  p.num_partials = num_partials;
  p.num_rows = n;
  p.num_heads = h;
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
  m.impl("decode_lists", TORCH_BOX(&DecodeLists<&DecodeAttentionCpu>));
  m.impl("key_scores", TORCH_BOX(&KeyScores<&DecodeAttentionCpu>));
  m.impl("prefill_attention", TORCH_BOX(&PrefillAttention<&PrefillAttentionCpu>));
  m.impl("context_attention", TORCH_BOX(&ContextAttention<&ContextAttentionCpu>));
  m.impl("tail_attention", TORCH_BOX(&TailAttention<&TailAttentionCpu>));
  m.impl("append_tokens", TORCH_BOX(&AppendTokens<&AppendTokensCpu>));
  m.impl("append_experts", TORCH_BOX(&AppendExperts<&AppendExpertsCpu>));
  m.impl("merge_partials", TORCH_BOX(&MergePartials<&MergePartialsCpu>));
}

#if defined(PIKV_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&DecodeAttention<&DecodeAttentionCuda>));
  m.impl("decode_lists", TORCH_BOX(&DecodeLists<&DecodeAttentionCuda>));
  m.impl("key_scores", TORCH_BOX(&KeyScores<&DecodeAttentionCuda>));
  m.impl("prefill_attention", TORCH_BOX(&PrefillAttention<&PrefillAttentionCuda>));
  m.impl("tail_attention", TORCH_BOX(&TailAttention<&TailAttentionCuda>));
  m.impl("append_tokens", TORCH_BOX(&AppendTokens<&AppendTokensCuda>));
  m.impl("append_experts", TORCH_BOX(&AppendExperts<&AppendExpertsCuda>));
  m.impl("merge_partials", TORCH_BOX(&MergePartials<&MergePartialsCuda>));
}

// Without tensors there is no device to choose a kernel by.
STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CompositeExplicitAutograd, m) {
  m.impl("decode_scratch_floats", TORCH_BOX(&DecodeScratch));
}
#endif

}  // namespace
}  // namespace pikv_ds
