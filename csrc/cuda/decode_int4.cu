#include "decode_tensor.cuh"

namespace pikv_ds {

void LaunchDecodeInt4(const DecodeLaunch& launch, cudaStream_t stream) {
  LaunchDecodeTensor<Element::kInt4>(launch, stream);
}

}  // namespace pikv_ds
