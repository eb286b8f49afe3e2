// The seam between the kernels and whoever calls them: plain structs and raw pointers.
//
// Kernels include this file and never torch, so they compile in a fraction of a second and can be
// called from any host program. bindings.cpp fills the structs and checks everything beforehand:
// a kernel trusts its params. All arrays are contiguous and row-major.
//
// Dimensions:
//   P  partials to merge, one per rank or per piece of the keys
//   N  rows, one per (token, query head)
//   D  head dimension
#pragma once

#include <cstdint>

namespace pikv_ds {

// Merges P partial attentions over disjoint sets of keys into the attention over their union.
// An empty partial has lse = -inf; its out is never read. A row with a NaN or +inf lse comes out as
// NaN: such a partial is broken, and hiding it would be worse.
struct MergePartialsParams {
  const float* outs;  // [P, N, D]
  const float* lses;  // [P, N], natural log
  float* out;         // [N, D]
  float* lse;         // [N], natural log
  int64_t num_partials;
  int64_t num_rows;
  int64_t head_dim;
};

void MergePartialsCpu(const MergePartialsParams& params);

}  // namespace pikv_ds
