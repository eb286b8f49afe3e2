// The arguments of all kernels: plain structs with raw pointers.
//
// Kernels include this file and never torch, so they compile in a fraction of a second and can be
// called from any host program. The bindings fill the structs and check everything beforehand: a
// kernel trusts its params. Arrays are contiguous and row-major unless strides are given. What an
// op means is told once, in pikv_ds/ops/reference.py.
//
// Dimensions (as there):
//   R  query rows             B  table rows; R is a multiple of B, T = R / B queries share a row
//   H  query heads            K  KV heads; H is a multiple of K
//   D  head size              S  page size             P  width of a table, or partials to merge
//   V  size of a value: D, but latent_dim of latent pages
//   N  any number
//
// XCpu runs on torch's OpenMP threads. XCuda enqueues on the given stream: no synchronisation, no
// allocation, capturable in a CUDA graph; what scratch memory it needs is a field of its params.
#pragma once

#include <cstdint>

#include "layout.h"

#if defined(PIKV_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace pikv_ds {

// Type of the caller's queries, keys and values.
enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// What sealing notes of a KV head's keys, or its values: pikv_ds/layout.py's SealFlag.
constexpr int32_t kNonFinite = 1;    // NaN or infinity among them
constexpr int32_t kBeyondRange = 2;  // all finite, but a scale or minimum that cannot be stored

struct SealPagesParams {
  const void* keys;    // [N, K, S, D] by strides below, channels contiguous
  const void* values;  // [N, K, S, D]; null for latent pages
  uint8_t* out;        // [N, page_bytes], rows out_stride bytes apart
  uint8_t* bounds;     // [N, 2, K, D] of dtype, rows bounds_stride bytes apart; or null
  int32_t* flags;      // one for every pages_per_flag; what is found is added by a bitwise or
  PageLayout layout;
  Dtype dtype;
  int64_t num_pages;
  int64_t pages_per_flag;
  int64_t key_strides[3];    // of N, K and S, in elements
  int64_t value_strides[3];  // of N, K and S, in elements
  int64_t out_stride;        // bytes
  int64_t bounds_stride;     // bytes
};

struct GatherPagesParams {
  Slabs slabs;
  const int32_t* slots;  // [N]
  uint8_t* out;          // [N, row_bytes]
  int64_t num_pages;
};

struct ScatterPagesParams {
  Slabs slabs;
  const int32_t* slots;  // [N], each once
  const uint8_t* pages;  // [N, row_bytes], rows stride bytes apart
  int64_t num_pages;
  int64_t stride;
};

// G ranks and M groups of pages: a sequence and unit each. See pikv_ds/ops/reference.py.
struct PlacePagesParams {
  const int32_t* preference;  // [N, G], -1 in the places that are left
  const int32_t* groups;      // [N]
  const int32_t* limits;      // [N]
  int32_t* loads;             // [M, G]
  int64_t* free;              // [G]
  int32_t* out;               // [N]
  int64_t source;             // a rank, or -1
  int64_t num_pages;
  int64_t num_ranks;
};

struct DecodeAttentionParams {
  const void* query;  // [R, H, D] of dtype
  Slabs slabs;
  PageLists lists;  // B
  float* out;       // [R, H, V]; null: key scores only, values are not read
  float* lse;       // [R, H]; null with out
  float* page_lse;  // [R, H, P]; null, or the lists are dense
  float* scratch;   // CUDA: split partials, see DecodeScratchFloats; else null
  PageLayout layout;
  Dtype dtype;
  float scale;
  int64_t num_rows;        // R
  int64_t num_table_rows;  // B
  int64_t num_heads;
  int64_t num_splits;  // CUDA: pieces of the sequence that are attended separately, at least 1
  int64_t out_stride;  // floats from row to row of out
  int64_t lse_stride;
};

struct PrefillAttentionParams {
  const void* query;  // [T, H, D] of dtype
  Slabs slabs;
  const int32_t* slots;  // [P], 0 is a hole
  float* out;            // [T, H, V]
  float* lse;            // [T, H]
  PageLayout layout;
  Dtype dtype;
  float scale;
  int64_t num_queries;
  int64_t num_heads;
  int64_t num_pages;
};

struct ContextAttentionParams {
  const void* query;   // [T, H, D] of dtype, by strides below, channels contiguous
  const void* keys;    // [K, N, D] of dtype
  const void* values;  // [K, N, D] of dtype; where V < D these are the keys
  float* out;          // [T, H, V]
  float* lse;          // [T, H]
  Dtype dtype;
  float scale;
  int64_t num_queries;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t num_keys;
  int64_t head_dim;
  int64_t value_dim;         // V
  int64_t query_strides[2];  // of T and H, in elements
  int64_t key_strides[2];    // of K and N, in elements
  int64_t value_strides[2];
  int64_t first_query;  // query t sees keys up to first_query + t; negative: all
};

struct TailAttentionParams {
  const void* query;       // [N, H, D] of dtype
  const void* keys;        // [B, K, S, D] of dtype
  const void* values;      // [B, K, S, D] of dtype; where V < D these are the keys
  const int32_t* indices;  // [N]: each query's tail; null: B is N, in order
  const int32_t* lengths;  // [N]
  float* out;              // [N, H, V]
  float* lse;              // [N, H]
  Dtype dtype;
  float scale;
  int64_t num_rows;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t page_size;
  int64_t head_dim;
  int64_t value_dim;   // V
  int64_t out_stride;  // floats from row to row of out
  int64_t lse_stride;
};

// Puts the newest token of M sequences into their tails, and looks for NaN and infinity in it.
struct AppendTokensParams {
  const void* keys;       // [N, K, D] of dtype, channels contiguous
  const void* values;     // [N, K, V] likewise; null where they are channels of the keys
  void* tail_keys;        // [B, K, S, D] of dtype
  void* tail_values;      // [B, K, S, V]
  const int32_t* places;  // [3, M]: tokens among N, tails among B, slots among S
  int32_t* flags;         // [1], kNonFinite is added by a bitwise or
  Dtype dtype;
  int64_t num_tokens;        // M
  int64_t key_strides[2];    // of N and K, in elements
  int64_t value_strides[2];  // of N and K, in elements
  int64_t num_kv_heads;
  int64_t page_size;
  int64_t head_dim;
  int64_t value_dim;  // V
};

// The same for the experts that the tokens chose, k each.
struct AppendExpertsParams {
  const void* experts;    // [N, k], integers of expert_bytes: 2, 4 or 8
  int16_t* tail_experts;  // [B, S, k]
  const int32_t* places;  // [3, M], as above
  int64_t expert_bytes;
  int64_t num_tokens;  // M
  int64_t page_size;
  int64_t top_k;
};

PIKV_HOST_DEVICE inline int16_t ExpertAt(const AppendExpertsParams& p, int64_t i) {
  if (p.expert_bytes == 8) return static_cast<int16_t>(static_cast<const int64_t*>(p.experts)[i]);
  if (p.expert_bytes == 4) return static_cast<int16_t>(static_cast<const int32_t*>(p.experts)[i]);
  return static_cast<const int16_t*>(p.experts)[i];
}

// Merges P partial attentions over disjoint sets of keys into the attention over their union.
// An empty partial has lse = -inf; its out is never read. A row with a NaN or +inf lse comes out as
// NaN: such a partial is broken, and hiding it would be worse. Rows of heads are contiguous; the
// others have strides, in elements.
struct MergePartialsParams {
  const float* outs;  // [P, N, H, D]
  const float* lses;  // [P, N, H], natural log
  void* out;          // [N, H, D] of dtype
  float* lse;         // [N, H], natural log; may be null
  Dtype dtype;
  int64_t num_partials;
  int64_t num_rows;  // N
  int64_t num_heads;
  int64_t head_dim;
  int64_t outs_strides[2];  // of P and N
  int64_t lses_strides[2];
  int64_t out_stride;  // of N
  int64_t lse_stride;
};

struct PageScoresParams {
  const void* query;      // [R, H, D] of dtype
  Slabs summaries;        // rows begin with [2, K, D] of bounds_dtype
  const int32_t* table;   // [R, P]
  const int32_t* counts;  // [R]
  float* out;             // [R, K, P]
  Dtype dtype;
  Dtype bounds_dtype;
  int64_t num_rows;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t table_width;
};

// Rows begin with codes of centres and spreads [2, K, C, D] of `bits` bits, C sub-pages to a page;
// of 4 bits channel i shares a byte with channel i + D / 2, as the lower half. Then float16 scales
// [2, K, C]. See pikv_ds/ops/summaries.py.
struct SubpageScoresParams {
  const void* query;      // [R, H, D] of dtype
  Slabs summaries;        // see above
  const int32_t* table;   // [R, P]
  const int32_t* counts;  // [R]
  float* out;             // [R, H, P]
  Dtype dtype;
  int32_t bits;  // 4 or 8
  float scale;
  int64_t num_rows;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t num_subpages;  // C
  int64_t table_width;
};

struct SelectPagesParams {
  const int32_t* table;   // [R, P]
  const int32_t* counts;  // [R]
  const float* scores;    // [R, K, P]
  const bool* pinned;     // [R, P]
  const int32_t* budget;  // [R]
  int32_t* out;           // [R, K, P]
  int64_t num_rows;
  int64_t num_kv_heads;
  int64_t table_width;
};

struct UtilityParams {
  float* mass;         // [slots]
  int32_t* last_step;  // [slots]
  int32_t* visits;     // [slots]
  int64_t num_slots;
  int32_t step;
  float decay;
};

struct UpdateUtilityParams {
  UtilityParams state;
  const int32_t* slots;   // [N], each at most once, 0 skipped
  const float* new_mass;  // [N]
  int64_t num_pages;
};

struct ChooseVictimsParams {
  UtilityParams state;
  const bool* evictable;  // [slots]
  float weights[3];       // of mass, recency and frequency
  int32_t* out;           // [V]
  int64_t num_victims;
  void* scratch;  // CUDA only; see ChooseVictimsScratchBytes
};

void SealPagesCpu(const SealPagesParams& params);
void GatherPagesCpu(const GatherPagesParams& params);
void ScatterPagesCpu(const ScatterPagesParams& params);
void PlacePagesCpu(const PlacePagesParams& params);
void DecodeAttentionCpu(const DecodeAttentionParams& params);
void PrefillAttentionCpu(const PrefillAttentionParams& params);
void ContextAttentionCpu(const ContextAttentionParams& params);
void TailAttentionCpu(const TailAttentionParams& params);
void AppendTokensCpu(const AppendTokensParams& params);
void AppendExpertsCpu(const AppendExpertsParams& params);
void MergePartialsCpu(const MergePartialsParams& params);
void PageScoresCpu(const PageScoresParams& params);
void SubpageScoresCpu(const SubpageScoresParams& params);
void SelectPagesCpu(const SelectPagesParams& params);
void UpdateUtilityCpu(const UpdateUtilityParams& params);
void ChooseVictimsCpu(const ChooseVictimsParams& params);

#if defined(PIKV_WITH_CUDA)
// Floats of DecodeAttentionParams::scratch.
int64_t DecodeScratchFloats(const DecodeAttentionParams& params);
// Bytes of ChooseVictimsParams::scratch.
int64_t ChooseVictimsScratchBytes(const ChooseVictimsParams& params);

void SealPagesCuda(const SealPagesParams& params, cudaStream_t stream);
void GatherPagesCuda(const GatherPagesParams& params, cudaStream_t stream);
void ScatterPagesCuda(const ScatterPagesParams& params, cudaStream_t stream);
void DecodeAttentionCuda(const DecodeAttentionParams& params, cudaStream_t stream);
void PrefillAttentionCuda(const PrefillAttentionParams& params, cudaStream_t stream);
void TailAttentionCuda(const TailAttentionParams& params, cudaStream_t stream);
void AppendTokensCuda(const AppendTokensParams& params, cudaStream_t stream);
void AppendExpertsCuda(const AppendExpertsParams& params, cudaStream_t stream);
void MergePartialsCuda(const MergePartialsParams& params, cudaStream_t stream);
void PageScoresCuda(const PageScoresParams& params, cudaStream_t stream);
void SubpageScoresCuda(const SubpageScoresParams& params, cudaStream_t stream);
void SelectPagesCuda(const SelectPagesParams& params, cudaStream_t stream);
void UpdateUtilityCuda(const UpdateUtilityParams& params, cudaStream_t stream);
void ChooseVictimsCuda(const ChooseVictimsParams& params, cudaStream_t stream);
#endif

}  // namespace pikv_ds
