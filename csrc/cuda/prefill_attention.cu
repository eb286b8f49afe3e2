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
  decode.table = params.slots;
  decode.counts = nullptr;  // all of the table
  decode.out = params.out;
  decode.lse = params.lse;
  decode.layout = params.layout;
  decode.dtype = params.dtype;
  decode.scale = params.scale;
  decode.num_rows = params.num_queries;
  decode.num_table_rows = 1;
  decode.num_heads = params.num_heads;
  decode.table_width = params.num_pages;
  decode.num_splits = 1;
  LaunchDecode("prefill_attention", DecodeLaunch{decode, params.out, params.lse}, stream);
}

}  // namespace pikv_ds
