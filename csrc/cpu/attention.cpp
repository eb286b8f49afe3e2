// The four attention ops: how they are split into tasks, and how the tasks' results are merged.
//
// A sequence is cut into pieces by its length alone, never by the number of threads, and pieces
// are merged in order: the same input gives the same bits on any machine with the same instruction
// set.

#include "attention.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "aligned_floats.h"
#include "isa.h"
#include "unpack.h"

namespace pikv_ds {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLn2 = 0.693147180559945309417f;

constexpr int kMaxRows = 128;           // query rows of a task: their state stays in the L2 cache
constexpr int64_t kPieceTokens = 1024;  // at least, in a piece of a sequence
constexpr int64_t kMaxPieces = 32;
constexpr int64_t kMaxStateFloats = 1 << 16;  // of a task with several KV heads
constexpr int64_t kSerialWork = 1 << 21;  // products below which threads cost more than they give
constexpr int kContextTokens = 64;        // of a block of plain keys

int NumThreads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

const AttentionKernel& FindKernel(Element element, int head_dim) {
  switch (CpuIsaInUse()) {
#if defined(PIKV_X86_KERNELS)
    case CpuIsaLevel::kAmx:
      return AmxAttention(element, head_dim);
    case CpuIsaLevel::kAvx512:
      return Avx512Attention(element, head_dim);
    case CpuIsaLevel::kAvx2:
      return Avx2Attention(element, head_dim);
#endif
    default:
      return PlainAttention(element, head_dim);
  }
}

Element ElementOf(Dtype dtype) { return static_cast<Element>(dtype); }
static_assert(static_cast<int>(Element::kFloat16) == static_cast<int>(Dtype::kFloat16) &&
                  static_cast<int>(Element::kBFloat16) == static_cast<int>(Dtype::kBFloat16),
              "the plain elements are numbered as the dtypes");

// Everything that the ops have in common: query rows, and the blocks each group of them attends.
struct AttentionWork {
  AttendTask task;  // all but what differs from task to task
  // Rows come in groups that attend the same blocks: the queries of one sequence.
  int64_t num_groups;
  int64_t queries_per_group;
  int num_kv_heads;
  std::vector<const BlockSource*> sources;  // per group
  std::vector<int64_t> num_blocks;          // per group
  int value_dim;                            // of an output: the first so many channels
  float* out;                               // [queries, H, V]; may be null
  float* lse;                               // [queries, H]
  int64_t out_stride, lse_stride;           // from query to query
};

// One cell of the work: some queries of a group and some KV heads, over a piece of its blocks.
struct Cell {
  int64_t group;
  int64_t first_query, num_queries;  // within the group
  int first_head, end_head;
  int64_t first_block, end_block;
  int64_t piece, num_pieces;
  int64_t state;  // where its state lies among those of work that is cut into pieces
};

const void* Advance(const void* query, Dtype dtype, int64_t elements) {
  return static_cast<const uint8_t*>(query) + elements * (dtype == Dtype::kFloat32 ? 4 : 2);
}

// Merges the states of a row's pieces, `stride` floats apart, in order.
void Finish(const float* states, int64_t stride, int64_t num_pieces, int num_places,
            const std::vector<int>& places, std::vector<float>* sums, float* out, float* lse) {
  float peak = kMinusInfinity;
  bool broken = false;
  for (int64_t piece = 0; piece < num_pieces; ++piece) {
    const float piece_peak = states[piece * stride + num_places + kPeak];
    broken |= std::isnan(states[piece * stride + num_places + kSum]);
    if (piece_peak > peak) peak = piece_peak;
  }
  sums->assign(num_places, 0.0f);
  float sum = 0.0f;
  for (int64_t piece = 0; piece < num_pieces; ++piece) {
    const float* state = states + piece * stride;
    if (state[num_places + kSum] == 0.0f) continue;  // it saw no key
    const float weight = std::exp2(state[num_places + kPeak] - peak);
    sum += weight * state[num_places + kSum];
    const float minima = state[num_places + kMinima];
    for (int n = 0; n < num_places; ++n) (*sums)[n] += weight * (state[n] + minima);
  }
  if (broken) sum = std::numeric_limits<float>::quiet_NaN();
  *lse = sum == 0.0f ? kMinusInfinity : (peak + std::log2(sum)) * kLn2;
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (size_t d = 0; d < places.size(); ++d) out[d] = (*sums)[places[d]] * inverse;
}

class Runner {
 public:
  explicit Runner(const AttentionWork& work)
      : work_(work),
        kernel_(FindKernel(work.task.element, work.task.head_dim)),
        num_places_(kernel_.num_places(work.task.head_dim)),
        state_stride_(StateStride(num_places_)) {
    places_.resize(work.value_dim);
    for (int n = 0; n < num_places_; ++n) {
      const int channel = kernel_.channel(work.task.head_dim, n);
      if (channel >= 0 && channel < work.value_dim) places_[channel] = n;
    }
  }

  void Run() {
    const int num_threads = MakeCells();
    if (num_states_ > 0) states_.reset(new float[num_states_ * state_stride_]);
    const int64_t num_cells = static_cast<int64_t>(cells_.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_threads > 1)
    for (int64_t i = 0; i < num_cells; ++i) RunCell(cells_[i]);
    if (num_states_ == 0) return;
    // The first piece of each set of pieces finds the others behind it.
#pragma omp parallel for schedule(dynamic, 4) num_threads(num_threads) if (num_threads > 1)
    for (int64_t i = 0; i < num_cells; ++i) {
      if (cells_[i].num_pieces > 1 && cells_[i].piece == 0) FinishCell(cells_[i]);
    }
  }

 private:
  int64_t RowsOf(const Cell& cell) const { return cell.num_queries * work_.task.group; }

  // Returns how many threads are worth it.
  int MakeCells() {
    const AttendTask& task = work_.task;
    const int64_t queries_per_cell =
        std::min<int64_t>(work_.queries_per_group, std::max(1, kMaxRows / task.group));
    const int64_t row_blocks = (work_.queries_per_group + queries_per_cell - 1) / queries_per_cell;

    std::vector<int64_t> pieces(work_.num_groups, 1);
    int64_t cells = 0, tokens = 0;
    for (int64_t group = 0; group < work_.num_groups; ++group) {
      const int64_t group_tokens = work_.num_blocks[group] * task.max_tokens;
      if (row_blocks == 1 && work_.out != nullptr) {
        pieces[group] = std::clamp<int64_t>(group_tokens / kPieceTokens, 1, kMaxPieces);
      }
      cells += pieces[group] * row_blocks;
      tokens += group_tokens;
    }
    const int64_t rows = work_.queries_per_group * task.group * work_.num_kv_heads;
    const int num_threads = tokens * rows * task.head_dim < kSerialWork ? 1 : NumThreads();

    // All KV heads of a page by one task read it from end to end; but each thread needs its share,
    // and the states of a task's rows must stay in its cache.
    int heads = work_.num_kv_heads;
    const int64_t wanted = num_threads == 1 ? 1 : 4 * num_threads;
    while (heads > 1 && (cells * ((work_.num_kv_heads + heads - 1) / heads) < wanted ||
                         heads * queries_per_cell * task.group * state_stride_ > kMaxStateFloats)) {
      heads = (heads + 1) / 2;
    }

    for (int64_t group = 0; group < work_.num_groups; ++group) {
      for (int64_t query = 0; query < work_.queries_per_group; query += queries_per_cell) {
        for (int head = 0; head < work_.num_kv_heads; head += heads) {
          Cell cell = {};
          cell.group = group;
          cell.first_query = query;
          cell.num_queries = std::min(queries_per_cell, work_.queries_per_group - query);
          cell.first_head = head;
          cell.end_head = std::min(head + heads, work_.num_kv_heads);
          cell.num_pieces = pieces[group];
          for (cell.piece = 0; cell.piece < cell.num_pieces; ++cell.piece) {
            cell.first_block = work_.num_blocks[group] * cell.piece / cell.num_pieces;
            cell.end_block = work_.num_blocks[group] * (cell.piece + 1) / cell.num_pieces;
            if (cell.num_pieces > 1) {
              cell.state = num_states_;
              num_states_ += (cell.end_head - cell.first_head) * RowsOf(cell);
            }
            cells_.push_back(cell);
          }
        }
      }
    }
    return static_cast<int>(std::min<int64_t>(num_threads, static_cast<int64_t>(cells_.size())));
  }

  void RunCell(const Cell& cell) {
    static thread_local std::vector<float> own_state;
    AttendTask task = work_.task;
    task.blocks = work_.sources[cell.group];
    task.first_block = cell.first_block;
    task.end_block = cell.end_block;
    task.first_head = cell.first_head;
    task.end_head = cell.end_head;
    task.num_rows = static_cast<int>(RowsOf(cell));
    const int64_t query = cell.group * work_.queries_per_group + cell.first_query;
    task.query = Advance(task.query, task.dtype, query * task.query_stride);
    if (task.page_lse != nullptr) task.page_lse += query * task.page_lse_stride;
    if (task.first_limit >= 0) {
      task.first_limit += cell.first_query;
      // Blocks that not even the last query sees.
      const int64_t seen = task.first_limit + cell.num_queries - 1;
      task.end_block = std::min(task.end_block, (seen + task.max_tokens - 1) / task.max_tokens);
      task.end_block = std::max(task.end_block, task.first_block);
    }
    if (cell.num_pieces > 1) {
      task.state = states_.get() + cell.state * state_stride_;
    } else {
      own_state.resize(std::max<size_t>(
          own_state.size(), (cell.end_head - cell.first_head) * RowsOf(cell) * state_stride_));
      task.state = own_state.data();
    }
    kernel_.attend(task);
    if (cell.num_pieces == 1 && work_.out != nullptr) FinishRows(cell, task.state);
  }

  void FinishCell(const Cell& cell) {
    FinishRows(cell, states_.get() + cell.state * state_stride_);
  }

  void FinishRows(const Cell& cell, const float* states) {
    const AttendTask& task = work_.task;
    const int64_t num_rows = RowsOf(cell), num_heads = cell.end_head - cell.first_head;
    std::vector<float> sums;
    for (int64_t head = 0; head < num_heads; ++head) {
      for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t query =
            cell.group * work_.queries_per_group + cell.first_query + row / task.group;
        const int64_t at = (cell.first_head + head) * task.group + row % task.group;
        Finish(states + (head * num_rows + row) * state_stride_,
               num_heads * num_rows * state_stride_, cell.num_pieces, num_places_, places_, &sums,
               work_.out + query * work_.out_stride + at * work_.value_dim,
               work_.lse + query * work_.lse_stride + at);
      }
    }
  }

  const AttentionWork& work_;
  const AttentionKernel& kernel_;
  const int num_places_;
  const int64_t state_stride_;
  std::vector<int> places_;  // of the channels' accumulators
  std::vector<Cell> cells_;
  int64_t num_states_ = 0;  // rows of states_
  std::unique_ptr<float[]> states_;
};

// Pages of one table row.
class PagedBlocks final : public BlockSource {
 public:
  PagedBlocks(const PageLayout& layout, const Slabs& slabs, PageList list, int64_t head_stride)
      : layout_(layout),
        slabs_(slabs),
        list_(list),
        head_stride_(head_stride),
        row_bytes_(layout.RowBytes()),
        key_scales_(layout.KeyScaleOffset()),
        values_(layout.latent_dim > 0 ? 0 : layout.ValueOffset()),
        value_scales_(layout.ValueScaleOffset()),
        scale_rows_(ScaleRows(layout.element)),
        value_scale_rows_(layout.latent_dim > 0 ? 0 : scale_rows_) {}

  bool Get(int64_t index, int kv_head, KvBlock* block) const override {
    const int32_t slot = list_[kv_head * head_stride_ + index];
    if (slot == 0) return false;
    const uint8_t* page = slabs_.Row(slot);
    const int64_t rows = int64_t{kv_head} * layout_.page_size * row_bytes_;
    block->keys = page + rows;
    block->values = page + values_ + rows;
    block->key_stride = block->value_stride = row_bytes_;
    block->float_scales = false;
    block->num_tokens = layout_.page_size;
    const auto scales = [&](int64_t section, int num_rows, int row, int size) {
      return row >= num_rows ? nullptr
                             : reinterpret_cast<const uint16_t*>(page + section) +
                                   (int64_t{row} * layout_.num_kv_heads + kv_head) * size;
    };
    block->key_scales = scales(key_scales_, scale_rows_, 0, layout_.head_dim);
    block->key_minima = scales(key_scales_, scale_rows_, 1, layout_.head_dim);
    block->value_scales = scales(value_scales_, value_scale_rows_, 0, layout_.page_size);
    block->value_minima = scales(value_scales_, value_scale_rows_, 1, layout_.page_size);
    return true;
  }

 private:
  PageLayout layout_;
  Slabs slabs_;
  PageList list_;
  int64_t head_stride_;  // from head to head of a table that has a selection for each
  int64_t row_bytes_, key_scales_, values_, value_scales_;
  int scale_rows_, value_scale_rows_;
};

// Packed pages of one table row, unpacked one KV head at a time into memory of the thread that
// asks.
class UnpackedBlocks final : public BlockSource {
 public:
  UnpackedBlocks(const PageLayout& layout, const Slabs& slabs, PageList list, int64_t head_stride)
      : layout_(layout), slabs_(slabs), list_(list), head_stride_(head_stride) {}

  bool Get(int64_t index, int kv_head, KvBlock* block) const override {
    const int32_t slot = list_[kv_head * head_stride_ + index];
    if (slot == 0) return false;
    const uint8_t* page = slabs_.Row(slot);
    const int dim = layout_.head_dim, tokens = layout_.page_size;
    const size_t codes = (size_t{2} * tokens * dim + 63) / 64 * 64;
    // Few pieces, so that they stay in the cache: that of the one attended to and that of the next.
    uint8_t* keys =
        Memory(2 * PartsOf(tokens), codes + 2 * (Room(dim) + Room(tokens)) * sizeof(float));
    uint8_t* values = keys + size_t{1} * tokens * dim;
    auto* scales = reinterpret_cast<float*>(keys + codes);
    const int64_t row = int64_t{kv_head} * tokens;
    const uint8_t* key_rows = page + row * layout_.RowBytes();
    const uint8_t* value_rows = page + layout_.ValueOffset() + row * layout_.ValueRowBytes();
    UnpackRows(key_rows, layout_.key_bits, tokens, dim, keys);
    UnpackRows(value_rows, layout_.value_bits, tokens, dim, values);
    block->keys = keys;
    block->values = values;
    block->key_stride = block->value_stride = dim;
    block->num_tokens = tokens;
    block->float_scales = layout_.byte_scales != 0;
    Scales(page + layout_.KeyScaleOffset(), kv_head, dim, scales, &block->key_scales,
           &block->key_minima);
    Scales(page + layout_.ValueScaleOffset(), kv_head, tokens, scales + 2 * Room(dim),
           &block->value_scales, &block->value_minima);
    return true;
  }

 private:
  // The next of the calling thread's pieces, 64-byte aligned.
  static uint8_t* Memory(int num_pieces, size_t bytes) {
    static thread_local std::array<AlignedFloats, 2 * kMaxParts> pieces;
    static thread_local unsigned turn = 0;
    AlignedFloats& piece = pieces[turn++ % num_pieces];
    piece.Grow((bytes + sizeof(float) - 1) / sizeof(float));
    return reinterpret_cast<uint8_t*>(piece.data());
  }

  static size_t Room(int size) { return static_cast<size_t>(size + 15) / 16 * 16; }

  // Of one KV head, `size` of each kind: where they are, or as float32 in `room`.
  void Scales(const uint8_t* section, int kv_head, int size, float* room, const void** scales,
              const void** minima) const {
    const uint8_t* own = section + layout_.ScaleBytes() * kv_head * size;
    const uint8_t* lows = own + layout_.ScaleBytes() * layout_.num_kv_heads * size;
    *scales = own;
    *minima = lows;
    if (layout_.byte_scales == 0) return;
    UnpackScales(own, lows, size, room, room + Room(size));
    *scales = room;
    *minima = room + Room(size);
  }

  PageLayout layout_;
  Slabs slabs_;
  PageList list_;
  int64_t head_stride_;  // from head to head of a table that has a selection for each
};

// Plain keys and values of one sequence; strides in bytes.
class PlainBlocks final : public BlockSource {
 public:
  PlainBlocks(const void* keys, const void* values, std::array<int64_t, 2> key_strides,
              std::array<int64_t, 2> value_strides, int64_t num_tokens, int block_tokens)
      : keys_(static_cast<const uint8_t*>(keys)),
        values_(static_cast<const uint8_t*>(values)),
        key_strides_(key_strides),
        value_strides_(value_strides),
        num_tokens_(num_tokens),
        block_tokens_(block_tokens) {}

  bool Get(int64_t index, int kv_head, KvBlock* block) const override {
    const int64_t first = index * block_tokens_;
    *block = {};
    block->keys = keys_ + kv_head * key_strides_[0] + first * key_strides_[1];
    block->values = values_ + kv_head * value_strides_[0] + first * value_strides_[1];
    block->key_stride = key_strides_[1];
    block->value_stride = value_strides_[1];
    block->num_tokens = static_cast<int>(std::min<int64_t>(block_tokens_, num_tokens_ - first));
    return true;
  }

 private:
  const uint8_t* keys_;
  const uint8_t* values_;
  std::array<int64_t, 2> key_strides_, value_strides_;
  int64_t num_tokens_;
  int block_tokens_;
};

}  // namespace

uint8_t* ThreadScratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    capacity = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, capacity));
  }
  return static_cast<uint8_t*>(memory.get());
}

void DecodeAttentionCpu(const DecodeAttentionParams& p) {
  const int64_t num_kv_heads = p.layout.num_kv_heads;
  if (p.page_lse != nullptr) {
    std::fill_n(p.page_lse, p.num_rows * p.num_heads * p.lists.width, kMinusInfinity);
  }
  if (p.num_rows == 0) return;
  AttentionWork work = {};
  AttendTask& task = work.task;
  task.element = p.layout.element;
  task.dtype = p.dtype;
  task.head_dim = p.layout.head_dim;
  task.latent = p.layout.latent_dim > 0;
  task.max_tokens = p.layout.page_size;
  task.group = static_cast<int>(p.num_heads / num_kv_heads);
  task.query = p.query;
  task.query_stride = p.num_heads * p.layout.head_dim;
  task.query_head_stride = p.layout.head_dim;
  task.scale = p.scale;
  task.first_limit = -1;
  task.page_lse = p.page_lse;
  task.page_lse_stride = p.num_heads * p.lists.width;
  task.page_lse_head_stride = p.lists.width;
  task.keys_only = p.out == nullptr;
  work.num_groups = p.num_table_rows;
  work.queries_per_group = p.num_rows / p.num_table_rows;
  work.num_kv_heads = p.layout.num_kv_heads;
  work.value_dim = p.layout.ValueDim();
  work.out = p.out;
  work.lse = p.lse;
  work.out_stride = p.out_stride;
  work.lse_stride = p.lse_stride;
  std::vector<PagedBlocks> blocks;
  std::vector<UnpackedBlocks> unpacked;
  blocks.reserve(p.num_table_rows);
  unpacked.reserve(p.num_table_rows);
  const int64_t head_stride = p.lists.per_head ? p.lists.width : 0;
  for (int64_t row = 0; row < p.num_table_rows; ++row) {
    const PageList list = p.lists.List(row, 0, p.layout.num_kv_heads);
    work.num_blocks.push_back(list.count);
    if (p.layout.Packed()) {
      unpacked.emplace_back(p.layout, p.slabs, list, head_stride);
      work.sources.push_back(&unpacked.back());
    } else {
      blocks.emplace_back(p.layout, p.slabs, list, head_stride);
      work.sources.push_back(&blocks.back());
    }
  }
  Runner(work).Run();
}

void PrefillAttentionCpu(const PrefillAttentionParams& p) {
  DecodeAttentionParams decode = {};
  decode.query = p.query;
  decode.slabs = p.slabs;
  decode.lists.slots = p.slots;
  decode.lists.width = p.num_pages;
  decode.out = p.out;
  decode.lse = p.lse;
  decode.layout = p.layout;
  decode.dtype = p.dtype;
  decode.scale = p.scale;
  decode.num_rows = p.num_queries;
  decode.num_table_rows = 1;  // all queries are those of one sequence
  decode.num_heads = p.num_heads;
  decode.out_stride = p.num_heads * p.layout.ValueDim();
  decode.lse_stride = p.num_heads;
  DecodeAttentionCpu(decode);
}

void ContextAttentionCpu(const ContextAttentionParams& p) {
  if (p.num_queries == 0) return;
  const int64_t bytes = p.dtype == Dtype::kFloat32 ? 4 : 2;
  const PlainBlocks blocks(p.keys, p.values, {p.key_strides[0] * bytes, p.key_strides[1] * bytes},
                           {p.value_strides[0] * bytes, p.value_strides[1] * bytes}, p.num_keys,
                           kContextTokens);
  AttentionWork work = {};
  AttendTask& task = work.task;
  task.element = ElementOf(p.dtype);
  task.dtype = p.dtype;
  task.head_dim = static_cast<int>(p.head_dim);
  task.max_tokens = kContextTokens;
  task.group = static_cast<int>(p.num_heads / p.num_kv_heads);
  task.query = p.query;
  task.query_stride = p.query_strides[0];
  task.query_head_stride = p.query_strides[1];
  task.scale = p.scale;
  task.first_limit = p.first_query < 0 ? -1 : p.first_query + 1;
  work.num_groups = 1;
  work.queries_per_group = p.num_queries;
  work.num_kv_heads = static_cast<int>(p.num_kv_heads);
  work.value_dim = static_cast<int>(p.value_dim);
  work.sources = {&blocks};
  work.num_blocks = {(p.num_keys + kContextTokens - 1) / kContextTokens};
  work.out = p.out;
  work.lse = p.lse;
  work.out_stride = p.num_heads * p.value_dim;
  work.lse_stride = p.num_heads;
  Runner(work).Run();
}

void TailAttentionCpu(const TailAttentionParams& p) {
  if (p.num_rows == 0) return;
  const int64_t bytes = p.dtype == Dtype::kFloat32 ? 4 : 2;
  const int64_t token_bytes = p.head_dim * bytes, head_bytes = p.page_size * token_bytes;
  AttentionWork work = {};
  AttendTask& task = work.task;
  task.element = ElementOf(p.dtype);
  task.dtype = p.dtype;
  task.head_dim = static_cast<int>(p.head_dim);
  task.max_tokens = static_cast<int>(p.page_size);
  task.group = static_cast<int>(p.num_heads / p.num_kv_heads);
  task.query = p.query;
  task.query_stride = p.num_heads * p.head_dim;
  task.query_head_stride = p.head_dim;
  task.scale = p.scale;
  task.first_limit = -1;
  work.num_groups = p.num_rows;
  work.queries_per_group = 1;
  work.num_kv_heads = static_cast<int>(p.num_kv_heads);
  work.value_dim = static_cast<int>(p.value_dim);
  work.out = p.out;
  work.lse = p.lse;
  work.out_stride = p.out_stride;
  work.lse_stride = p.lse_stride;
  const std::array<int64_t, 2> strides = {head_bytes, token_bytes};
  std::vector<PlainBlocks> blocks;
  blocks.reserve(p.num_rows);
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t tail = p.indices == nullptr ? row : p.indices[row];
    const int64_t offset = tail * p.num_kv_heads * head_bytes;
    blocks.emplace_back(static_cast<const uint8_t*>(p.keys) + offset,
                        static_cast<const uint8_t*>(p.values) + offset, strides, strides,
                        p.lengths[row], static_cast<int>(p.page_size));
    work.sources.push_back(&blocks.back());
    work.num_blocks.push_back(p.lengths[row] > 0 ? 1 : 0);
  }
  Runner(work).Run();
}

}  // namespace pikv_ds
