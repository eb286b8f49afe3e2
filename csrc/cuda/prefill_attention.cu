// A prompt's chunk over the sealed pages before it: decode_attention with one table row, whose
// queries are all of the chunk's. Each tile of 8 or 16 of them reads all pages again, from L2 for
// the most part, and decodes them again: right, and bound by instructions rather than by memory.
#include "decode.cuh"

namespace pikv_ds {

void PrefillAttentionCuda(const PrefillAttentionParams& params, cudaStream_t stream) {
  if (params.num_queries == 0) return;
  DecodeAttentionParams decode = {};
  decode.query = params.query;
  decode.slabs = params.slabs;
  decode.lists.slots = params.slots;
  decode.lists.width = params.num_pages;
  decode.out = params.out;
  decode.lse = params.lse;
  decode.layout = params.layout;
  decode.dtype = params.dtype;
  decode.scale = params.scale;
  decode.num_rows = params.num_queries;
  decode.num_table_rows = 1;
  decode.num_heads = params.num_heads;
  decode.num_splits = 1;
  const int64_t stride = params.num_heads * params.layout.ValueDim();
  const DecodeLaunch launch{decode, params.out, params.lse, stride, params.num_heads};
  LaunchDecode("prefill_attention", launch, stream);
}

}  // namespace pikv_ds
