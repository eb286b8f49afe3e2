#include "decode_tensor.cuh"

namespace pikv_ds {

void LaunchDecodeBFloat16(const DecodeLaunch& launch, cudaStream_t stream) {
  LaunchDecodeTensor<Element::kBFloat16>(launch, stream);
}

}  // namespace pikv_ds
