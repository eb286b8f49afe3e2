// Attention on the CPU, between the driver (attention.cpp), which splits the work into tasks and
// merges their results, and the kernels (attention_kernel.h), one set per instruction set.
#pragma once

#include <cstdint>

#include "../launch.h"

namespace pikv_ds {

// Tokens of one KV head that are attended together: a page's, or a stretch of plain keys.
struct KvBlock {
  const uint8_t* keys;
  const uint8_t* values;
  int64_t key_stride;  // bytes from token to token
  int64_t value_stride;
  // Values that are the keys (latent attention) have the keys' scales, per channel.
  const void* key_scales;    // [D]; null for elements without scales
  const void* key_minima;    // [D]; null for fp8
  const void* value_scales;  // [tokens]
  const void* value_minima;
  bool float_scales;  // scales and minima are float32, else float16
  int num_tokens;     // at least 1
};

// Blocks of one KV head are attended together as far as they are small, since much of the work is
// per row and not per token: so many, and never more than kMaxParts. Vectors hold up to 16 tokens.
constexpr int kMaxParts = 4;
inline int PartsOf(int block_tokens) {
  if (block_tokens % 16 != 0 || block_tokens > 64) return 1;
  return 64 / block_tokens < kMaxParts ? 64 / block_tokens : kMaxParts;
}

// The blocks of one sequence.
class BlockSource {
 public:
  // False: a hole, nothing is attended. A block that has to be unpacked is good until 2 * PartsOf()
  // more have been got by the thread.
  virtual bool Get(int64_t index, int kv_head, KvBlock* block) const = 0;

 protected:
  ~BlockSource() = default;
};

// Attention of some query rows over a range of blocks and of KV heads. Row m is query head
// m % group of query m / group.
struct AttendTask {
  Element element;
  Dtype dtype;  // of the queries
  int head_dim;
  bool latent;     // values are the keys
  int max_tokens;  // of a block
  const BlockSource* blocks;
  int64_t first_block, end_block;
  int first_head, end_head;  // KV heads
  int num_rows;
  int group;
  const void* query;                        // of row 0 and KV head 0
  int64_t query_stride, query_head_stride;  // in elements
  float scale;
  int64_t first_limit;  // causal: query t sees this many keys + t; negative: all keys
  float* state;         // [heads of the task, num_rows, StateStride()], written
  float* page_lse;      // of row 0, KV head 0 and block 0; or null
  int64_t page_lse_stride, page_lse_head_stride;
  bool keys_only;  // only page_lse is wanted
};

// One instruction set's attention for one element.
struct AttentionKernel {
  void (*attend)(const AttendTask& task);
  // Number of accumulators per row for a head size. They are in whatever order suits the kernel,
  // possibly with gaps: `channel` tells which one is in a place, -1 in a gap.
  int (*num_places)(int head_dim);
  int (*channel)(int head_dim, int place);
};

// A row's state: its accumulators, then the minima's share of every channel, the largest score
// (log2) and the sum of weights relative to it; the row's result is (accumulator + kMinima) / kSum.
enum RowState { kMinima = 0, kPeak = 1, kSum = 2 };
constexpr int kStateTail = 16;
inline int64_t StateStride(int num_places) { return num_places + kStateTail; }

// Each finds its kernel, or one of the instruction set before it for what it has none of its own.
const AttentionKernel& PlainAttention(Element element, int head_dim);
const AttentionKernel& Avx2Attention(Element element, int head_dim);
const AttentionKernel& Avx512Attention(Element element, int head_dim);
const AttentionKernel& AmxAttention(Element element, int head_dim);

// At least `bytes` bytes that belong to the calling thread until it asks again; 64-byte aligned.
uint8_t* ThreadScratch(int64_t bytes);

}  // namespace pikv_ds
