// Scratch memory from the start of a cache line, so that no vector of it lies across two.
#pragma once

#include <cstdint>
#include <vector>

namespace pikv_ds {

inline constexpr int kMaxLanes = 16;  // of the widest vectors, see foreach_isa.h

class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t size = 0) : lines_(Padded(size) / kLine) {}

  // To `size` at least; what was there before is lost.
  void Grow(int64_t size) {
    if (Padded(size) / kLine > static_cast<int64_t>(lines_.size())) *this = AlignedFloats(size);
  }

  // The next size at which another array may begin.
  static constexpr int64_t Padded(int64_t size) { return (size + kLine - 1) / kLine * kLine; }
  float* data() { return reinterpret_cast<float*>(lines_.data()); }

 private:
  static constexpr int64_t kLine = 16;
  struct alignas(64) Line {
    float floats[kLine];
  };
  std::vector<Line> lines_;
};

}  // namespace pikv_ds
