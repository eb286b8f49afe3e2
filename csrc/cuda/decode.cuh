// What the kernels of decode_attention share: which rows, pages and outputs a block has.
//
// A block attends the query rows of one table row and KV head (or a tile of them) over one split of
// the table. Its query rows are its columns: column j is query row b T + j / G of query head
// k G + j % G, G = H / K. A warp owns whole pages: every kWarps-th entry of the split.
#pragma once

#include "attend.cuh"

namespace pikv_ds {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = kDecodeWarps * kWarpSize;

// What decode_attention and prefill_attention make of their params.
struct DecodeLaunch {
  DecodeAttentionParams params;
  float* outs;  // [num_splits, R, H, V], rows out_stride apart; params.out with one split
  float* lses;  // [num_splits, R, H], rows lse_stride apart
  int64_t out_stride, lse_stride;
};

struct DecodeBlock {
  int64_t table_row;
  int kv_head;
  int group;         // query heads per KV head
  int row_queries;   // query rows per table row
  int num_columns;   // of all tiles
  int first_column;  // of this tile
  int split;
  PageList list;   // of this table row (and KV head)
  int begin, end;  // the split's entries

  __device__ DecodeBlock(const DecodeAttentionParams& p, int columns_per_tile) {
    const int num_kv_heads = p.layout.num_kv_heads;
    table_row = blockIdx.z;
    kv_head = blockIdx.y;
    group = static_cast<int>(p.num_heads) / num_kv_heads;
    row_queries = static_cast<int>(p.num_rows) / static_cast<int>(p.num_table_rows);
    num_columns = group * row_queries;
    // Tiles of one split are neighbours: they read the same pages at about the same time, from L2.
    const int num_tiles = (num_columns + columns_per_tile - 1) / columns_per_tile;
    const int x = static_cast<int>(blockIdx.x);
    split = x / num_tiles;
    first_column = (x - split * num_tiles) * columns_per_tile;
    list = p.lists.List(table_row, kv_head, num_kv_heads);
    begin = static_cast<int>(list.count * split / p.num_splits);
    end = static_cast<int>(list.count * (split + 1) / p.num_splits);
  }

  static dim3 Grid(const DecodeAttentionParams& p, int columns_per_tile) {
    const int64_t columns = p.num_heads / p.layout.num_kv_heads * (p.num_rows / p.num_table_rows);
    return dim3(p.num_splits * CeilDiv(columns, columns_per_tile), p.layout.num_kv_heads,
                p.num_table_rows);
  }

  // Query row and head of a column, which counts from the tile's first.
  __device__ int64_t Row(int column) const {
    return table_row * row_queries + (first_column + column) / group;
  }
  __device__ int64_t Head(int column) const {
    return int64_t{kv_head} * group + (first_column + column) % group;
  }
  // Index into [R, H] of a column.
  __device__ int64_t RowAndHead(const DecodeAttentionParams& p, int column) const {
    return Row(column) * p.num_heads + Head(column);
  }
  // Where the split's partial of a column goes.
  __device__ float* Out(const DecodeLaunch& launch, int column, int value_dim) const {
    const int64_t row = split * launch.params.num_rows + Row(column);
    return launch.outs + row * launch.out_stride + Head(column) * value_dim;
  }
  __device__ float* Lse(const DecodeLaunch& launch, int column) const {
    const int64_t row = split * launch.params.num_rows + Row(column);
    return launch.lses + row * launch.lse_stride + Head(column);
  }
  // Columns of this tile.
  __device__ int Columns(int columns_per_tile) const {
    return min(columns_per_tile, num_columns - first_column);
  }

  // Writes -inf where no page will be: all of the split's entries, and the last split's beyond the
  // count. A barrier must follow.
  __device__ void ClearPageLse(const DecodeAttentionParams& p, int columns) const {
    if (p.page_lse == nullptr) return;
    const int64_t last = split == p.num_splits - 1 ? p.lists.width : end;
    for (int column = 0; column < columns; ++column) {
      float* page_lse = p.page_lse + RowAndHead(p, column) * p.lists.width;
      for (int64_t i = begin + threadIdx.x; i < last; i += kDecodeThreads)
        page_lse[i] = NegativeInfinity();
    }
  }
};

// A warp's pages, in order, holes left out. Addresses come 32 at a time, a page per lane, so that
// the chain table -> slab -> page is waited for once per 32 pages.
class PageQueue {
 public:
  __device__ PageQueue(const DecodeBlock& block, int warp) : next_(block.begin + warp), pages_(0) {}

  // The next page and its place in the table, the same in all lanes; false after the last.
  __device__ __forceinline__ bool Next(const DecodeBlock& block, const Slabs& slabs,
                                       const uint8_t** page, int* position) {
    while (pages_ == 0) {
      if (next_ >= block.end) return false;
      const int lane = threadIdx.x % kWarpSize;
      const int mine = next_ + lane * kDecodeWarps;
      const int32_t slot = mine < block.end ? block.list[mine] : 0;
      address_ = slot > 0 ? reinterpret_cast<unsigned long long>(slabs.Row(slot)) : 0;
      pages_ = Ballot(slot > 0);
      first_ = next_;
      next_ += kWarpSize * kDecodeWarps;
    }
    const int lane = FirstBit(pages_);
    pages_ &= pages_ - 1;
    *page = reinterpret_cast<const uint8_t*>(Shuffle(address_, lane));
    *position = first_ + lane * kDecodeWarps;
    return true;
  }

 private:
  unsigned long long address_;  // of this lane's page
  uint32_t pages_;              // lanes whose pages are still to come
  int first_;                   // place of lane 0's page in the table
  int next_;                    // place of the first page of the next 32
};

// In decode_generic.cu: any layout and dtype with head_dim up to kMaxHeadDim.
void LaunchDecodeGeneric(const DecodeLaunch& launch, cudaStream_t stream);
// In decode_<element>.cu: tensor cores, for the shapes of TensorLayoutSupported.
void LaunchDecodeBFloat16(const DecodeLaunch& launch, cudaStream_t stream);
void LaunchDecodeFloat16(const DecodeLaunch& launch, cudaStream_t stream);
void LaunchDecodeFp8(const DecodeLaunch& launch, cudaStream_t stream);
void LaunchDecodeInt8(const DecodeLaunch& launch, cudaStream_t stream);
void LaunchDecodeInt4(const DecodeLaunch& launch, cudaStream_t stream);
void LaunchDecodeInt2(const DecodeLaunch& launch, cudaStream_t stream);

// In decode_attention.cu: picks one of them.
void LaunchDecode(const char* op, const DecodeLaunch& launch, cudaStream_t stream);

}  // namespace pikv_ds
