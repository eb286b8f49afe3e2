// One block per token and KV head copies its key and its value.
#include "common.cuh"

namespace pikv_ds {
namespace {

constexpr int kThreads = 128;

// Whether this thread's elements are finite.
__device__ bool CopyRow(const void* from, int64_t from_at, void* to, int64_t to_at, int64_t size,
                        Dtype dtype) {
  bool finite = true;
  for (int64_t d = threadIdx.x; d < size; d += kThreads) {
    const float x = LoadFloat(from, from_at + d, dtype);
    finite &= fabsf(x) < BitsFloat(0x7f800000u);  // false for NaN, too
    if (dtype == Dtype::kFloat32) {
      static_cast<float*>(to)[to_at + d] = x;
    } else {
      static_cast<uint16_t*>(to)[to_at + d] = static_cast<const uint16_t*>(from)[from_at + d];
    }
  }
  return finite;
}

__global__ void __launch_bounds__(kThreads) AppendTokensKernel(const AppendTokensParams p) {
  const int64_t i = blockIdx.x, head = blockIdx.y;
  const int64_t token = p.places[i], tail = p.places[p.num_tokens + i],
                slot = p.places[2 * p.num_tokens + i];
  const int64_t to = (tail * p.num_kv_heads + head) * p.page_size + slot;
  bool finite = CopyRow(p.keys, token * p.key_strides[0] + head * p.key_strides[1], p.tail_keys,
                        to * p.head_dim, p.head_dim, p.dtype);
  if (p.values != nullptr) {
    finite &= CopyRow(p.values, token * p.value_strides[0] + head * p.value_strides[1],
                      p.tail_values, to * p.value_dim, p.value_dim, p.dtype);
  }
  if (!finite) atomicOr(p.flags, kNonFinite);
}

__global__ void __launch_bounds__(kThreads) AppendExpertsKernel(const AppendExpertsParams p) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x, i = at / p.top_k;
  if (i >= p.num_tokens) return;
  const int64_t token = p.places[i], tail = p.places[p.num_tokens + i],
                slot = p.places[2 * p.num_tokens + i], k = at % p.top_k;
  p.tail_experts[(tail * p.page_size + slot) * p.top_k + k] = ExpertAt(p, token * p.top_k + k);
}

}  // namespace

void AppendTokensCuda(const AppendTokensParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  Launch("append_tokens", AppendTokensKernel, dim3(params.num_tokens, params.num_kv_heads),
         kThreads, 0, stream, params);
}

void AppendExpertsCuda(const AppendExpertsParams& params, cudaStream_t stream) {
  const int64_t num = params.num_tokens * params.top_k;
  if (num == 0) return;
  Launch("append_experts", AppendExpertsKernel, dim3(CeilDiv(num, kThreads)), kThreads, 0, stream,
         params);
}

}  // namespace pikv_ds
