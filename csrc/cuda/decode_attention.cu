// Picks the kernel of decode_attention and key scores, and merges the splits.
#include "decode.cuh"
#include "fragments.cuh"

namespace pikv_ds {
namespace {

// Queries and plain pages must be of one type for the tensor cores. float32 queries want float32
// accuracy, which those do not have.
bool UsesTensorCores(const DecodeAttentionParams& p) {
  if (p.dtype == Dtype::kFloat32 || !TensorLayoutSupported(p.layout.element, p.layout.head_dim) ||
      p.layout.Packed() || p.layout.latent_dim > 0) {
    return false;
  }
  if (p.layout.element == Element::kBFloat16) return p.dtype == Dtype::kBFloat16;
  if (p.layout.element == Element::kFloat16) return p.dtype == Dtype::kFloat16;
  return true;
}

int64_t OutFloats(const DecodeAttentionParams& p) {
  return p.num_rows * p.num_heads * p.layout.ValueDim();
}

}  // namespace

void LaunchDecode(const char* op, const DecodeLaunch& launch, cudaStream_t stream) {
  const DecodeAttentionParams& p = launch.params;
  const int most = p.layout.latent_dim > 0 ? kMaxLatentDim : kMaxHeadDim;
  if (p.layout.ValueDim() > most) {
    throw std::runtime_error(std::string(op) + ": values of " +
                             std::to_string(p.layout.ValueDim()) +
                             " channels have no CUDA kernel; the most are " + std::to_string(most));
  }
  if (!UsesTensorCores(p)) return LaunchDecodeGeneric(launch, stream);
  switch (p.layout.element) {
    case Element::kBFloat16:
      return LaunchDecodeBFloat16(launch, stream);
    case Element::kFloat16:
      return LaunchDecodeFloat16(launch, stream);
    case Element::kFp8:
      return LaunchDecodeFp8(launch, stream);
    case Element::kInt8:
      return LaunchDecodeInt8(launch, stream);
    case Element::kInt4:
      return LaunchDecodeInt4(launch, stream);
    case Element::kInt2:
      return LaunchDecodeInt2(launch, stream);
    case Element::kFloat32:
      break;  // not UsesTensorCores
  }
}

int64_t DecodeScratchFloats(const DecodeAttentionParams& params) {
  if (params.out == nullptr || params.num_splits == 1) return 0;
  return params.num_splits * (OutFloats(params) + params.num_rows * params.num_heads);
}

void DecodeAttentionCuda(const DecodeAttentionParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const int64_t lse_stride = params.num_heads, out_stride = lse_stride * params.layout.ValueDim();
  DecodeLaunch launch{params, params.out, params.lse, params.out_stride, params.lse_stride};
  const bool merge = params.out != nullptr && params.num_splits > 1;
  if (merge) {
    float* const lses = params.scratch + params.num_splits * OutFloats(params);
    launch = {params, params.scratch, lses, out_stride, lse_stride};
  }
  LaunchDecode("decode_attention", launch, stream);
  if (!merge) return;
  MergePartialsParams splits{};
  splits.outs = launch.outs;
  splits.lses = launch.lses;
  splits.out = params.out;
  splits.lse = params.lse;
  splits.dtype = Dtype::kFloat32;
  splits.num_partials = params.num_splits;
  splits.num_rows = params.num_rows;
  splits.num_heads = params.num_heads;
  splits.head_dim = params.layout.ValueDim();
  splits.outs_strides[0] = params.num_rows * out_stride;
  splits.outs_strides[1] = out_stride;
  splits.lses_strides[0] = params.num_rows * lse_stride;
  splits.lses_strides[1] = lse_stride;
  splits.out_stride = params.out_stride;
  splits.lse_stride = params.lse_stride;
  MergePartialsCuda(splits, stream);
}

}  // namespace pikv_ds
