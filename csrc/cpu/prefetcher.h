// Asks for memory ahead of its use, a little at a time. Included inside a target pragma.
#pragma once

#include <cstdint>

#include "attention.h"
#include "attention_vectors.h"

namespace pikv_ds {
namespace {

// Asks for the next blocks' memory while these are attended. Pages are scattered, so the hardware
// cannot foresee where the next one lies; and a core can have only some 16 lines under way, so they
// are asked for a few at a time: a burst would stall it. Keys and values take turns, as two streams
// come in faster than one.
class Prefetcher {
 public:
  void Start() { num_parts_ = lines_ = part_ = asked_ = 0; }

  // Adds `bytes` of keys and as many of values.
  void Add(const uint8_t* keys, const uint8_t* values, int64_t bytes) {
    lines_ = (bytes + kLine - 1) / kLine;  // all parts are as long
    keys_[num_parts_] = keys - num_parts_ * lines_ * kLine;
    values_[num_parts_] = values - num_parts_ * lines_ * kLine;
    ++num_parts_;
  }

  // Asks until a share of the lines has been asked for.
  PIKV_INLINE void Until(float share) {
    const int64_t goal = static_cast<int>(static_cast<float>(num_parts_ * lines_) * share);
    while (asked_ < goal) {
      const int64_t end = Min(goal, (part_ + 1) * lines_);
      const uint8_t *keys = keys_[part_], *values = values_[part_];
      for (int64_t line = asked_; line < end; ++line) {
        __builtin_prefetch(keys + line * kLine, 0, 2);
        __builtin_prefetch(values + line * kLine, 0, 2);
      }
      asked_ = end;
      part_ += end == (part_ + 1) * lines_;
    }
  }

  // Asks for something small at once.
  static void Now(const void* begin, int64_t bytes) {
    const uint8_t* from = static_cast<const uint8_t*>(begin);
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const uint8_t *keys_[kMaxParts], *values_[kMaxParts];  // less the lines of the parts before
  int64_t num_parts_ = 0, lines_ = 0, part_ = 0, asked_ = 0;
};

}  // namespace
}  // namespace pikv_ds
