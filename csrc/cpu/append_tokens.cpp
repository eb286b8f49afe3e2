#include <cstring>

#include "../launch.h"

namespace pikv_ds {
namespace {

// Whether all exponents are below the one of NaN and infinity.
template <typename Word, Word kExponent>
bool CopyFinite(const Word* __restrict__ from, Word* __restrict__ to, int64_t size) {
  int broken = 0;
  for (int64_t i = 0; i < size; ++i) {
    to[i] = from[i];
    broken |= (from[i] & kExponent) == kExponent;
  }
  return broken == 0;
}

bool CopyFinite(const void* from, void* to, int64_t size, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    return CopyFinite<uint32_t, 0x7f800000>(static_cast<const uint32_t*>(from),
                                            static_cast<uint32_t*>(to), size);
  }
  const auto* const words = static_cast<const uint16_t*>(from);
  if (dtype == Dtype::kBFloat16) {
    return CopyFinite<uint16_t, 0x7f80>(words, static_cast<uint16_t*>(to), size);
  }
  return CopyFinite<uint16_t, 0x7c00>(words, static_cast<uint16_t*>(to), size);
}

}  // namespace

void AppendTokensCpu(const AppendTokensParams& p) {
  const int64_t bytes = p.dtype == Dtype::kFloat32 ? 4 : 2;
  const int32_t *tokens = p.places, *tails = tokens + p.num_tokens, *slots = tails + p.num_tokens;
  bool finite = true;
  const auto append = [&](const void* from, const int64_t* strides, void* tail, int64_t dim) {
    for (int64_t i = 0; i < p.num_tokens; ++i) {
      for (int64_t head = 0; head < p.num_kv_heads; ++head) {
        const int64_t to = ((tails[i] * p.num_kv_heads + head) * p.page_size + slots[i]) * dim;
        finite &= CopyFinite(
            static_cast<const char*>(from) + (tokens[i] * strides[0] + head * strides[1]) * bytes,
            static_cast<char*>(tail) + to * bytes, dim, p.dtype);
      }
    }
  };
  append(p.keys, p.key_strides, p.tail_keys, p.head_dim);
  if (p.values != nullptr) append(p.values, p.value_strides, p.tail_values, p.value_dim);
  if (!finite) *p.flags |= kNonFinite;
}

void AppendExpertsCpu(const AppendExpertsParams& p) {
  const int32_t *tokens = p.places, *tails = tokens + p.num_tokens, *slots = tails + p.num_tokens;
  for (int64_t i = 0; i < p.num_tokens; ++i) {
    int16_t* const to = p.tail_experts + (tails[i] * p.page_size + slots[i]) * p.top_k;
    for (int64_t k = 0; k < p.top_k; ++k) to[k] = ExpertAt(p, tokens[i] * p.top_k + k);
  }
}

}  // namespace pikv_ds
