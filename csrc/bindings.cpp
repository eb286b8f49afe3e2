// The ops of `torch.ops.pikv_ds`; with checks.h the only code of csrc/ that includes torch.
//
// It uses torch's stable ABI: it compiles in seconds where torch/extension.h takes most of a
// minute, and one binary serves torch 2.11 and later (setup.py sets TORCH_TARGET_VERSION).
//
// Per op: check the arguments, fill the params of launch.h, launch the kernel. Each op is a
// template over its kernel, so CPU and CUDA share the checks. The op's meaning is told once, in
// pikv_ds/ops/reference.py.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "checks.h"
#include "cpu/isa.h"
#include "launch.h"

#if defined(PIKV_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>
// Declared by torch's headers only where USE_CUDA is set, which is not for extensions.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream);
#endif

namespace pikv_ds {
namespace {

// What a kernel's type tells: its params, its device and how it is launched.
template <typename Function>
struct KernelTraits;

template <typename P>
struct KernelTraits<void (*)(const P&)> {
  using Params = P;
  static constexpr Device kDevice = Device::kCpu;
  static void Launch(void (*kernel)(const P&), const P& params, const Args&) { kernel(params); }
};

#if defined(PIKV_WITH_CUDA)
template <typename P>
struct KernelTraits<void (*)(const P&, cudaStream_t)> {
  using Params = P;
  static constexpr Device kDevice = Device::kCuda;
  static void Launch(void (*kernel)(const P&, cudaStream_t), const P& params, const Args& args) {
    const torch::stable::accelerator::DeviceGuard guard(args.device_index());
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(args.device_index(), &stream));
    kernel(params, static_cast<cudaStream_t>(stream));
  }
};
#endif

template <auto kKernel>
using Traits = KernelTraits<decltype(kKernel)>;

template <auto kKernel>
void Launch(const typename Traits<kKernel>::Params& params, const Args& args) {
  Traits<kKernel>::Launch(kKernel, params, args);
}

template <auto kKernel>
void SealPages(const Tensor& keys, std::optional<Tensor> values, int64_t element,
               int64_t num_kv_heads, int64_t page_size, int64_t latent_dim, Tensor out,
               std::optional<Tensor> bounds, Tensor flags) {
  Args args("seal_pages", Traits<kKernel>::kDevice, keys);
  args.CheckDim("keys", keys, 4, "[N, K, S, D]");
  const int64_t n = keys.size(0), k = num_kv_heads, s = page_size, d = keys.size(3);
  const ScalarType dtype = keys.scalar_type();

  SealPagesParams p{};
  p.layout = args.LayoutOf(element, k, s, d, latent_dim);
  p.dtype = args.FloatingDtype("keys", dtype);
  // Plain elements have the number of their type.
  if (ScaleRows(p.layout.element) == 0 && element != static_cast<int64_t>(p.dtype)) {
    args.Fail("element must be the type of keys (", static_cast<int64_t>(p.dtype),
              ") or a quantized one, got ", element);
  }
  p.num_pages = n;
  p.keys = args.StridedIn("keys", keys, {n, k, s, d}, "[N, K, S, D]", dtype, p.key_strides);
  if (latent_dim == 0) {
    if (!values) args.Fail("values must have shape [N, K, S, D], got None");
    p.values =
        args.StridedIn("values", *values, {n, k, s, d}, "[N, K, S, D]", dtype, p.value_strides);
  }
  p.out = args.RowsOut("out", out, n, p.layout.PageBytes(), "[N, page_bytes]", &p.out_stride);
  if (bounds) {
    const int64_t bounds_bytes = 2 * k * d * static_cast<int64_t>(keys.element_size());
    p.bounds =
        args.RowsOut("bounds", *bounds, n, bounds_bytes, "[N, bounds_bytes]", &p.bounds_stride);
  }
  p.flags = args.Out<int32_t>("flags", flags, {1}, "[1]");
  Launch<kKernel>(p, args);
}

template <auto kKernel>
void GatherPages(const Tensor& slab_pointers, int64_t slab_rows, int64_t row_bytes,
                 const Tensor& slots, Tensor out) {
  Args args("gather_pages", Traits<kKernel>::kDevice, slots);
  args.CheckDim("slots", slots, 1, "[N]");
  const int64_t n = slots.size(0);

  GatherPagesParams p{};
  p.slabs = args.SlabsOf(slab_pointers, slab_rows, row_bytes);
  p.slots = args.In<int32_t>("slots", slots, {n}, "[N]");
  p.out = args.Out<uint8_t>("out", out, {n, row_bytes}, "[N, row_bytes]");
  p.num_pages = n;
  if constexpr (Traits<kKernel>::kDevice == Device::kCpu) {
    // Copying a page takes far longer than this look at where it lies.
    const int64_t num_slabs = slab_pointers.size(0);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t slab = p.slots[i] / slab_rows;
      if (p.slots[i] < 0 || slab >= num_slabs || p.slabs.pointers[slab] == 0) {
        args.Fail("slots[", i, "] = ", p.slots[i], " is in slab ", slab,
                  ", which was given back or never was");
      }
    }
  }
  Launch<kKernel>(p, args);
}

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

// Bytes that choose_victims' scratch must have.
int64_t ChooseVictimsScratch(int64_t num_slots, int64_t num_victims) {
  ChooseVictimsParams p{};
  p.state.num_slots = num_slots;
  p.num_victims = num_victims;
  return ChooseVictimsScratchBytes(p);
}
#endif

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

UtilityParams UtilityState(Args& args, const Tensor& mass, const Tensor& last_step,
                           const Tensor& visits, int64_t step, double decay) {
  args.CheckDim("mass", mass, 1, "[slots]");
  UtilityParams p{};
  p.num_slots = mass.size(0);
  p.mass = args.Out<float>("mass", mass, {p.num_slots}, "[slots]");
  p.last_step = args.Out<int32_t>("last_step", last_step, {p.num_slots}, "[slots]");
  p.visits = args.Out<int32_t>("visits", visits, {p.num_slots}, "[slots]");
  p.step = args.Int32("step", step, 0);
  p.decay = static_cast<float>(decay);
  return p;
}

template <auto kKernel>
void UpdateUtility(const Tensor& slots, const Tensor& new_mass, int64_t step, double decay,
                   Tensor mass, Tensor last_step, Tensor visits) {
  Args args("update_utility", Traits<kKernel>::kDevice, mass);
  args.CheckDim("slots", slots, 1, "[N]");
  const int64_t n = slots.size(0);

  UpdateUtilityParams p{};
  p.state = UtilityState(args, mass, last_step, visits, step, decay);
  p.slots = args.In<int32_t>("slots", slots, {n}, "[N]");
  p.new_mass = args.In<float>("new_mass", new_mass, {n}, "[N]");
  p.num_pages = n;
  Launch<kKernel>(p, args);
}

// The state is only read here, but the params have one type for both ops.
template <auto kKernel>
void ChooseVictims(const Tensor& mass, const Tensor& last_step, const Tensor& visits,
                   const Tensor& evictable, int64_t step, double decay, double mass_weight,
                   double recency_weight, double frequency_weight, Tensor out,
                   std::optional<Tensor> scratch) {
  Args args("choose_victims", Traits<kKernel>::kDevice, mass);
  args.CheckDim("out", out, 1, "[V]");
  const int64_t num_victims = out.size(0);

  ChooseVictimsParams p{};
  p.state = UtilityState(args, mass, last_step, visits, step, decay);
  p.evictable = args.In<bool>("evictable", evictable, {p.state.num_slots}, "[slots]");
  p.weights[0] = static_cast<float>(mass_weight);
  p.weights[1] = static_cast<float>(recency_weight);
  p.weights[2] = static_cast<float>(frequency_weight);
  p.out = args.Out<int32_t>("out", out, {num_victims}, "[V]");
  p.num_victims = num_victims;
#if defined(PIKV_WITH_CUDA)
  if constexpr (Traits<kKernel>::kDevice == Device::kCuda) {
    if (const int64_t bytes = ChooseVictimsScratchBytes(p); bytes > 0) {
      if (!scratch) args.Fail("scratch must have shape [bytes] = [", bytes, "], got None");
      p.scratch = args.Out<uint8_t>("scratch", *scratch, {bytes}, "[bytes]");
    }
  }
#endif
  Launch<kKernel>(p, args);
}

// The types of the arguments that several ops take: storage, pages in it, attention's result.
#define PIKV_SLABS "Tensor slab_pointers, int slab_rows, int row_bytes, "
#define PIKV_LAYOUT "int element, int num_kv_heads, int page_size, int latent_dim, "
#define PIKV_PARTIAL "Tensor(a!) out, Tensor(b!) lse"

STABLE_TORCH_LIBRARY(pikv_ds, m) {
  m.def("seal_pages(Tensor keys, Tensor? values, " PIKV_LAYOUT
        "Tensor(a!) out, Tensor(b!)? bounds, Tensor(c!) flags) -> ()");
  m.def("gather_pages(" PIKV_SLABS "Tensor slots, Tensor(a!) out) -> ()");
  m.def("decode_attention(Tensor query, " PIKV_SLABS "Tensor table, Tensor counts, " PIKV_LAYOUT
        "float scale, " PIKV_PARTIAL
        ", Tensor(c!)? page_lse, int num_splits, Tensor(d!)? scratch) -> ()");
  m.def("key_scores(Tensor query, " PIKV_SLABS "Tensor table, Tensor counts, " PIKV_LAYOUT
        "float scale, Tensor(a!) out, int num_splits) -> ()");
  m.def("prefill_attention(Tensor query, " PIKV_SLABS "Tensor slots, " PIKV_LAYOUT
        "float scale, " PIKV_PARTIAL ") -> ()");
  m.def(
      "context_attention(Tensor query, Tensor keys, Tensor values, float scale, "
      "int? first_query, " PIKV_PARTIAL ") -> ()");
  m.def(
      "tail_attention(Tensor query, Tensor keys, Tensor values, Tensor lengths, "
      "float scale, " PIKV_PARTIAL ") -> ()");
  m.def("merge_partials(Tensor outs, Tensor lses, " PIKV_PARTIAL ") -> ()");
  m.def("page_scores(Tensor query, " PIKV_SLABS
        "Tensor table, Tensor counts, "
        "ScalarType bounds_dtype, int num_kv_heads, Tensor(a!) out) -> ()");
  m.def("subpage_scores(Tensor query, " PIKV_SLABS
        "Tensor table, Tensor counts, "
        "int num_kv_heads, int num_subpages, int bits, float scale, Tensor(a!) out) -> ()");
  m.def(
      "select_pages(Tensor table, Tensor counts, Tensor scores, Tensor pinned, Tensor budget, "
      "Tensor(a!) out) -> ()");
  m.def(
      "update_utility(Tensor slots, Tensor new_mass, int step, float decay, Tensor(a!) mass, "
      "Tensor(b!) last_step, Tensor(c!) visits) -> ()");
  m.def(
      "choose_victims(Tensor mass, Tensor last_step, Tensor visits, Tensor evictable, int step, "
      "float decay, float mass_weight, float recency_weight, float frequency_weight, "
      "Tensor(a!) out, Tensor(b!)? scratch) -> ()");
#if defined(PIKV_WITH_CUDA)
  m.def("decode_scratch_floats(int num_rows, int num_heads, int head_dim, int num_splits) -> int");
  m.def("choose_victims_scratch_bytes(int num_slots, int num_victims) -> int");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CPU, m) {
  m.impl("seal_pages", TORCH_BOX(&SealPages<&SealPagesCpu>));
  m.impl("gather_pages", TORCH_BOX(&GatherPages<&GatherPagesCpu>));
  m.impl("decode_attention", TORCH_BOX(&DecodeAttention<&DecodeAttentionCpu>));
  m.impl("key_scores", TORCH_BOX(&KeyScores<&DecodeAttentionCpu>));
  m.impl("prefill_attention", TORCH_BOX(&PrefillAttention<&PrefillAttentionCpu>));
  m.impl("context_attention", TORCH_BOX(&ContextAttention<&ContextAttentionCpu>));
  m.impl("tail_attention", TORCH_BOX(&TailAttention<&TailAttentionCpu>));
  m.impl("merge_partials", TORCH_BOX(&MergePartials<&MergePartialsCpu>));
  m.impl("page_scores", TORCH_BOX(&PageScores<&PageScoresCpu>));
  m.impl("subpage_scores", TORCH_BOX(&SubpageScores<&SubpageScoresCpu>));
  m.impl("select_pages", TORCH_BOX(&SelectPages<&SelectPagesCpu>));
  m.impl("update_utility", TORCH_BOX(&UpdateUtility<&UpdateUtilityCpu>));
  m.impl("choose_victims", TORCH_BOX(&ChooseVictims<&ChooseVictimsCpu>));
}

#if defined(PIKV_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CUDA, m) {
  m.impl("seal_pages", TORCH_BOX(&SealPages<&SealPagesCuda>));
  m.impl("gather_pages", TORCH_BOX(&GatherPages<&GatherPagesCuda>));
  m.impl("decode_attention", TORCH_BOX(&DecodeAttention<&DecodeAttentionCuda>));
  m.impl("key_scores", TORCH_BOX(&KeyScores<&DecodeAttentionCuda>));
  m.impl("prefill_attention", TORCH_BOX(&PrefillAttention<&PrefillAttentionCuda>));
  m.impl("tail_attention", TORCH_BOX(&TailAttention<&TailAttentionCuda>));
  m.impl("merge_partials", TORCH_BOX(&MergePartials<&MergePartialsCuda>));
  m.impl("page_scores", TORCH_BOX(&PageScores<&PageScoresCuda>));
  m.impl("subpage_scores", TORCH_BOX(&SubpageScores<&SubpageScoresCuda>));
  m.impl("select_pages", TORCH_BOX(&SelectPages<&SelectPagesCuda>));
  m.impl("update_utility", TORCH_BOX(&UpdateUtility<&UpdateUtilityCuda>));
  m.impl("choose_victims", TORCH_BOX(&ChooseVictims<&ChooseVictimsCuda>));
}

// Without tensors there is no device to choose a kernel by.
STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CompositeExplicitAutograd, m) {
  m.impl("decode_scratch_floats", TORCH_BOX(&DecodeScratch));
  m.impl("choose_victims_scratch_bytes", TORCH_BOX(&ChooseVictimsScratch));
}
#endif

}  // namespace
}  // namespace pikv_ds

// `import pikv_ds._C` loads this library, and loading it registers the ops above. The Python module
// itself only tells what was built and what is used of it.
#if !defined(PIKV_CUDA_ARCHITECTURES)
#define PIKV_CUDA_ARCHITECTURES ""
#endif
#ifndef PIKV_WHY_NO_CUDA
#define PIKV_WHY_NO_CUDA ""
#endif

static PyObject* CpuIsa(PyObject*, PyObject*) { return PyUnicode_FromString(pikv_ds::CpuIsa()); }

static PyObject* CudaArchitectures(PyObject*, PyObject*) {
  return PyUnicode_FromString(PIKV_CUDA_ARCHITECTURES);
}

static PyObject* WhyNoCuda(PyObject*, PyObject*) { return PyUnicode_FromString(PIKV_WHY_NO_CUDA); }

PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {
      {"cpu_isa", CpuIsa, METH_NOARGS, "Instruction set that the CPU kernels use."},
      {"cuda_architectures", CudaArchitectures, METH_NOARGS,
       "GPU architectures that the CUDA kernels were built for, empty without any."},
      {"why_no_cuda", WhyNoCuda, METH_NOARGS,
       "Why there are no CUDA kernels, as setup.py found when it built this; empty with them."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  return PyModule_Create(&module);
}
