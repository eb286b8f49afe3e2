// The ops that write, copy and place pages.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../launch.h"
#include "checks.h"
#include "launch_kernel.h"

namespace pikv_ds {
namespace {

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
  args.CheckDim("flags", flags, 1, "[F]");
  args.CheckMultiple("pages", n, "flags", flags.size(0));
  p.flags = args.Out<int32_t>("flags", flags, {flags.size(0)}, "[F]");
  p.pages_per_flag = std::max<int64_t>(1, n / flags.size(0));
  Launch<kKernel>(p, args);
}

// Copying a page takes far longer than this look at where it lies.
void CheckSlots(const Args& args, const Slabs& slabs, const int32_t* slots, int64_t num_pages,
                int64_t num_slabs) {
  for (int64_t i = 0; i < num_pages; ++i) {
    const int64_t slab = slots[i] / slabs.slab_rows;
    if (slots[i] < 0 || slab >= num_slabs || slabs.pointers[slab] == 0) {
      args.Fail("slots[", i, "] = ", slots[i], " is in slab ", slab,
                ", which was given back or never was");
    }
  }
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
    CheckSlots(args, p.slabs, p.slots, n, slab_pointers.size(0));
  }
  Launch<kKernel>(p, args);
}

template <auto kKernel>
void ScatterPages(const Tensor& slab_pointers, int64_t slab_rows, int64_t row_bytes,
                  const Tensor& slots, const Tensor& pages) {
  Args args("scatter_pages", Traits<kKernel>::kDevice, slots);
  args.CheckDim("slots", slots, 1, "[N]");
  const int64_t n = slots.size(0);

  ScatterPagesParams p{};
  p.slabs = args.SlabsOf(slab_pointers, slab_rows, row_bytes);
  p.slots = args.In<int32_t>("slots", slots, {n}, "[N]");
  p.pages = args.RowsIn("pages", pages, n, row_bytes, "[N, row_bytes]", &p.stride);
  p.num_pages = n;
  if constexpr (Traits<kKernel>::kDevice == Device::kCpu) {
    CheckSlots(args, p.slabs, p.slots, n, slab_pointers.size(0));
  }
  Launch<kKernel>(p, args);
}

void PlacePages(const Tensor& preference, const Tensor& groups, const Tensor& limits,
                int64_t source, Tensor loads, Tensor free, Tensor out) {
  Args args("place_pages", Device::kCpu, preference);
  args.CheckDim("preference", preference, 2, "[N, G]");
  args.CheckDim("loads", loads, 2, "[M, G]");
  const int64_t n = preference.size(0), g = preference.size(1), m = loads.size(0);

  PlacePagesParams p{};
  p.preference = args.In<int32_t>("preference", preference, {n, g}, "[N, G]");
  p.groups = args.In<int32_t>("groups", groups, {n}, "[N]");
  p.limits = args.In<int32_t>("limits", limits, {n}, "[N]");
  p.loads = args.Out<int32_t>("loads", loads, {m, g}, "[M, G]");
  p.free = args.Out<int64_t>("free", free, {g}, "[G]");
  p.out = args.Out<int32_t>("out", out, {n}, "[N]");
  p.source = source;
  p.num_pages = n;
  p.num_ranks = g;
  for (int64_t i = 0; i < n; ++i) {
    if (p.groups[i] < 0 || p.groups[i] >= m) {
      args.Fail("groups[", i, "] = ", p.groups[i], ", but loads has ", m, " groups");
    }
    for (int64_t j = 0; j < g; ++j) {
      const int32_t rank = p.preference[i * g + j];
      if (rank < -1 || rank >= g) {
        args.Fail("preference[", i, ", ", j, "] = ", rank, ", but there are ", g, " ranks");
      }
    }
  }
  PlacePagesCpu(p);
}

STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CPU, m) {
  m.impl("seal_pages", TORCH_BOX(&SealPages<&SealPagesCpu>));
  m.impl("gather_pages", TORCH_BOX(&GatherPages<&GatherPagesCpu>));
  m.impl("scatter_pages", TORCH_BOX(&ScatterPages<&ScatterPagesCpu>));
  m.impl("place_pages", TORCH_BOX(&PlacePages));
}

#if defined(PIKV_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CUDA, m) {
  m.impl("seal_pages", TORCH_BOX(&SealPages<&SealPagesCuda>));
  m.impl("gather_pages", TORCH_BOX(&GatherPages<&GatherPagesCuda>));
  m.impl("scatter_pages", TORCH_BOX(&ScatterPages<&ScatterPagesCuda>));
}
#endif

}  // namespace
}  // namespace pikv_ds
