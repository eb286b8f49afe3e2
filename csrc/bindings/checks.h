// Argument checks of the ops: from tensors to the raw pointers of launch.h.
//
// A check reads a tensor's metadata and costs nanoseconds, whatever the tensor's size. What a table
// or a list of slots holds is trusted.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../launch.h"

namespace pikv_ds {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Device { kCpu, kCuda };

template <typename T>
struct ScalarTypeOf;
template <>
struct ScalarTypeOf<float> {
  static constexpr ScalarType value = ScalarType::Float;
};
template <>
struct ScalarTypeOf<int64_t> {
  static constexpr ScalarType value = ScalarType::Long;
};
template <>
struct ScalarTypeOf<int32_t> {
  static constexpr ScalarType value = ScalarType::Int;
};
template <>
struct ScalarTypeOf<int16_t> {
  static constexpr ScalarType value = ScalarType::Short;
};
template <>
struct ScalarTypeOf<uint8_t> {
  static constexpr ScalarType value = ScalarType::Byte;
};
template <>
struct ScalarTypeOf<bool> {
  static constexpr ScalarType value = ScalarType::Bool;
};

template <typename Sizes>
std::string ShapeString(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "";
  text << "[";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

// The arguments of one call. Every accessor checks one of them and returns what the params want of
// it; its error names the op, the argument, what was wanted and what was given.
class Args {
 public:
  using Shape = std::initializer_list<int64_t>;

  // All tensors must be where `first` is, and that must be `device`: the dispatcher chose the
  // device by any one of the tensors.
  Args(const char* op, Device device, const Tensor& first)
      : op_(op), device_(device), device_index_(first.get_device_index()) {}

  int32_t device_index() const { return device_index_; }

  // STD_TORCH_CHECK would put a path and line of ours before the message; callers need neither.
  template <typename... Parts>
  [[noreturn, gnu::cold, gnu::noinline]] void Fail(const Parts&... parts) const {
    std::ostringstream message;
    message << op_ << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  // `layout` spells out `expected` in letters: "[N, D]".
  void CheckShape(const char* name, const Tensor& tensor, Shape expected,
                  const char* layout) const {
    const auto sizes = tensor.sizes();
    if (!std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end())) {
      Fail(name, " must have shape ", layout, " = ", ShapeString(expected), ", got ",
           ShapeString(sizes));
    }
  }

  // For the tensors that the letters are taken from.
  void CheckDim(const char* name, const Tensor& tensor, int64_t dim, const char* layout) const {
    if (tensor.dim() != dim) {
      Fail(name, " must have ", dim, " dimensions ", layout, ", got shape ",
           ShapeString(tensor.sizes()));
    }
  }

  void CheckDtype(const char* name, const Tensor& tensor, ScalarType expected) const {
    if (const ScalarType dtype = tensor.scalar_type(); dtype != expected) {
      Fail(name, " must be ", expected, ", got ", dtype);
    }
  }

  // `name` is what the message calls the type.
  Dtype FloatingDtype(const char* name, ScalarType dtype) const {
    switch (dtype) {
      case ScalarType::Float:
        return Dtype::kFloat32;
      case ScalarType::BFloat16:
        return Dtype::kBFloat16;
      case ScalarType::Half:
        return Dtype::kFloat16;
      default:
        Fail(name, " must be Float, BFloat16 or Half, got ", dtype);
    }
  }

  int32_t Int32(const char* name, int64_t value, int64_t minimum) const {
    constexpr int64_t kMaximum = std::numeric_limits<int32_t>::max();
    if (value < minimum || value > kMaximum) {
      Fail(name, " must be from ", minimum, " to ", kMaximum, ", got ", value);
    }
    return static_cast<int32_t>(value);
  }

  // Input and output with contiguous elements.
  const void* In(const char* name, const Tensor& tensor, Shape shape, const char* layout,
                 ScalarType dtype) {
    CheckContiguous(name, tensor, shape, layout, dtype);
    Note(name, tensor, tensor.const_data_ptr(), /*written=*/false);
    return tensor.const_data_ptr();
  }
  template <typename T>
  const T* In(const char* name, const Tensor& tensor, Shape shape, const char* layout) {
    return static_cast<const T*>(In(name, tensor, shape, layout, ScalarTypeOf<T>::value));
  }
  template <typename T>
  T* Out(const char* name, const Tensor& tensor, Shape shape, const char* layout) {
    CheckContiguous(name, tensor, shape, layout, ScalarTypeOf<T>::value);
    Note(name, tensor, tensor.const_data_ptr(), /*written=*/true);
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  // Input whose last dimension is contiguous; the strides of the others go to `strides`.
  const void* StridedIn(const char* name, const Tensor& tensor, Shape shape, const char* layout,
                        ScalarType dtype, int64_t* strides) const {
    CheckDevice(name, tensor);
    CheckDtype(name, tensor, dtype);
    CheckShape(name, tensor, shape, layout);
    const auto given = tensor.strides();
    if (given.back() != 1 && tensor.sizes().back() > 1) {
      Fail(name, " must have contiguous rows, got shape ", ShapeString(tensor.sizes()),
           " with strides ", ShapeString(given));
    }
    std::copy(given.begin(), given.end() - 1, strides);
    return tensor.const_data_ptr();
  }

  // A partial's output or its log-sum-exps: contiguous rows, which may be parts of longer rows
  // `stride` elements apart.
  template <typename T>
  T* PartialOut(const char* name, const Tensor& tensor, Shape shape, const char* layout,
                int64_t* stride) {
    return static_cast<T*>(PartialOut(name, tensor, shape, layout, ScalarTypeOf<T>::value, stride));
  }
  void* PartialOut(const char* name, const Tensor& tensor, Shape shape, const char* layout,
                   ScalarType dtype, int64_t* stride) {
    int64_t row = 1;
    for (auto size = shape.begin() + 1; size != shape.end(); ++size) row *= *size;
    *stride = row;
    if (tensor.is_contiguous()) {
      CheckContiguous(name, tensor, shape, layout, dtype);
      Note(name, tensor, tensor.const_data_ptr(), /*written=*/true);
    } else {
      int64_t strides[4];
      StridedIn(name, tensor, shape, layout, dtype, strides);
      CheckRows(name, tensor, 1);
      *stride = tensor.strides()[0];
      if (*stride < row && *shape.begin() > 1) {
        Fail(name, " must have rows that do not overlap, got shape ", ShapeString(tensor.sizes()),
             " with strides ", ShapeString(tensor.strides()));
      }
    }
    return tensor.mutable_data_ptr();
  }
  // Partials [P, N, ..., H, D], of which the first two dimensions have strides.
  const float* PartialsIn(const char* name, const Tensor& tensor, Shape shape, const char* layout,
                          int64_t* strides) {
    int64_t given[4];
    const auto* const data =
        static_cast<const float*>(StridedIn(name, tensor, shape, layout, ScalarType::Float, given));
    CheckRows(name, tensor, 2);
    if (tensor.is_contiguous()) Note(name, tensor, data, /*written=*/false);
    std::copy_n(tensor.strides().begin(), 2, strides);
    return data;
  }

  // `num_rows` rows of contiguous bytes, which may be parts of longer rows `stride` apart.
  const uint8_t* RowsIn(const char* name, const Tensor& tensor, int64_t num_rows, int64_t row_bytes,
                        const char* layout, int64_t* stride) const {
    const ScalarType bytes = ScalarType::Byte;
    return static_cast<const uint8_t*>(
        StridedIn(name, tensor, {num_rows, row_bytes}, layout, bytes, stride));
  }
  uint8_t* RowsOut(const char* name, const Tensor& tensor, int64_t num_rows, int64_t row_bytes,
                   const char* layout, int64_t* stride) const {
    StridedIn(name, tensor, {num_rows, row_bytes}, layout, ScalarType::Byte, stride);
    if (*stride < row_bytes && num_rows > 1) {
      Fail(name, " must have rows that do not overlap, got shape ", ShapeString(tensor.sizes()),
           " with strides ", ShapeString(tensor.strides()));
    }
    return static_cast<uint8_t*>(tensor.mutable_data_ptr());
  }

  Slabs SlabsOf(const Tensor& pointers, int64_t slab_rows, int64_t row_bytes) {
    CheckDim("slab_pointers", pointers, 1, "[slabs]");
    if (slab_rows < 1) Fail("slab_rows must be at least 1, got ", slab_rows);
    return {In<int64_t>("slab_pointers", pointers, {pointers.size(0)}, "[slabs]"), slab_rows,
            row_bytes};
  }

  // Slabs of whole pages.
  Slabs PagesOf(const Tensor& pointers, int64_t slab_rows, int64_t row_bytes,
                const PageLayout& layout) {
    if (row_bytes != layout.PageBytes()) {
      Fail("slabs must have rows of page_bytes = ", layout.PageBytes(), ", got ", row_bytes);
    }
    return SlabsOf(pointers, slab_rows, row_bytes);
  }

  // `latent_dim`: 0 for pages that are not latent.
  PageLayout LayoutOf(int64_t element, int64_t num_kv_heads, int64_t page_size, int64_t head_dim,
                      int64_t latent_dim) const {
    constexpr int64_t kLast = static_cast<int64_t>(Element::kInt2);
    PageLayout layout{};
    // Of packed pages: bits of keys and of values, and in the highest byte whether scales are bytes
    // (1) and whether sealing narrows ranges (2).
    layout.key_bits = static_cast<int32_t>(element >> 8 & 0xff);
    layout.value_bits = static_cast<int32_t>(element >> 16 & 0xff);
    layout.byte_scales = static_cast<int32_t>(element >> 24 & 1);
    layout.clip = static_cast<int32_t>(element >> 25 & 1);
    element = layout.Packed() ? element & 0xff : element;
    if (element < 0 || element > kLast) {
      Fail("element must be from 0 to ", kLast, ", got ", element);
    }
    layout.element = static_cast<Element>(element);
    if (layout.Packed()) CheckPacked(layout, head_dim);
    layout.num_kv_heads = Int32("num_kv_heads", num_kv_heads, 1);
    layout.page_size = Int32("page_size", page_size, 1);
    layout.head_dim = Int32("head_dim", head_dim, 1);
    if (const int per_byte = 8 / ElementBits(layout.element); per_byte && head_dim % per_byte) {
      Fail("head_dim must be a multiple of the ", per_byte, " elements in a byte, got ", head_dim);
    }
    layout.latent_dim = Int32("latent_dim", latent_dim, 0);
    if (latent_dim > head_dim) {
      Fail("latent_dim must be at most head_dim = ", head_dim, ", got ", latent_dim);
    }
    return layout;
  }

  void CheckPacked(const PageLayout& layout, int64_t head_dim) const {
    for (const int bits : {layout.key_bits, layout.value_bits}) {
      const int per_byte = bits == 3 ? 8 : 8 / std::max(bits, 1);
      if (bits < 1 || bits > 8 || (bits > 4 && bits < 8)) {
        Fail("packed elements must have 1, 2, 3, 4 or 8 bits, got ", bits);
      }
      if (head_dim % per_byte) {
        Fail("head_dim must be a multiple of the ", per_byte, " elements in a byte, got ",
             head_dim);
      }
    }
    if (layout.element != Element::kInt8) Fail("packed pages are unpacked to int8, got others");
  }

  // Unpacked keys and values lie apart.
  void CheckReadable(const PageLayout& layout) const {
    if (layout.Packed() && layout.latent_dim > 0) Fail("packed pages cannot be latent ones");
  }

  // Values [..., V] of plain keys [..., D]: as wide as these, or a view of their first V channels.
  // Returns V.
  int64_t ValueDim(const Tensor& keys, const Tensor& values) const {
    const auto key_sizes = keys.sizes(), sizes = values.sizes();
    if (values.dim() != keys.dim() || sizes.back() == key_sizes.back()) return key_sizes.back();
    const auto key_strides = keys.strides(), strides = values.strides();
    if (sizes.back() < 1 || sizes.back() > key_sizes.back() ||
        !std::equal(sizes.begin(), sizes.end() - 1, key_sizes.begin()) ||
        !std::equal(strides.begin(), strides.end(), key_strides.begin()) ||
        values.scalar_type() != keys.scalar_type() ||
        values.const_data_ptr() != keys.const_data_ptr()) {
      Fail("values must be as wide as keys, or a view of their first channels, got shapes ",
           ShapeString(key_sizes), " and ", ShapeString(sizes));
    }
    return sizes.back();
  }

  void CheckMultiple(const char* name, int64_t number, const char* of, int64_t divisor) const {
    if (divisor == 0 ? number != 0 : number % divisor != 0) {
      Fail(name, " must be a multiple of ", of, " = ", divisor, ", got ", number);
    }
  }

 private:
  struct Range {
    const char* name;
    const char* begin;
    const char* end;
    bool written;
  };

  void CheckDevice(const char* name, const Tensor& tensor) const {
    const bool there = device_ == Device::kCpu
                           ? tensor.is_cpu()
                           : tensor.is_cuda() && tensor.get_device_index() == device_index_;
    if (there) return;
    Fail(name, " must be on ", device_ == Device::kCpu ? "the CPU" : "the same GPU as the others",
         ", got another device");
  }

  // The dimensions from `first` on lie together.
  void CheckRows(const char* name, const Tensor& tensor, int64_t first) const {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    int64_t wanted = 1;
    for (int64_t dim = tensor.dim() - 1; dim >= first; --dim) {
      if (sizes[dim] > 1 && strides[dim] != wanted) {
        Fail(name, " must have contiguous rows, got shape ", ShapeString(sizes), " with strides ",
             ShapeString(strides));
      }
      wanted *= sizes[dim];
    }
  }

  void CheckContiguous(const char* name, const Tensor& tensor, Shape shape, const char* layout,
                       ScalarType dtype) const {
    CheckDevice(name, tensor);
    CheckDtype(name, tensor, dtype);
    CheckShape(name, tensor, shape, layout);
    if (!tensor.is_contiguous()) {
      Fail(name, " must be contiguous, got shape ", ShapeString(tensor.sizes()), " with strides ",
           ShapeString(tensor.strides()));
    }
  }

  // Kernels write their outputs while they still read their inputs, so no output may share memory
  // with anything else. Strided tensors are not compared: they may lie between each other's rows.
  void Note(const char* name, const Tensor& tensor, const void* data, bool written) {
    const char* begin = static_cast<const char*>(data);
    const Range range{
        name, begin, begin + tensor.numel() * static_cast<int64_t>(tensor.element_size()), written};
    const std::less<const char*> before;  // defined for pointers into different arrays, unlike <
    for (int i = 0; i < num_ranges_; ++i) {
      const Range& other = ranges_[i];
      if ((written || other.written) && before(range.begin, other.end) &&
          before(other.begin, range.end)) {
        Fail(written ? name : other.name, " must not share memory with ",
             written ? other.name : name, ", got overlapping tensors");
      }
    }
    if (num_ranges_ < kMaxRanges) ranges_[num_ranges_++] = range;
  }

  static constexpr int kMaxRanges = 12;  // more contiguous tensors than any op has

  const char* op_;
  Device device_;
  int32_t device_index_;
  int num_ranges_ = 0;
  Range ranges_[kMaxRanges];
};

}  // namespace pikv_ds
