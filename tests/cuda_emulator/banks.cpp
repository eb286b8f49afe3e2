// Checked while compiling: no load of keys or values from shared memory in decode_products.cuh has a
// bank conflict, and the lanes' words and units cover every channel once.
#include "../../csrc/cuda/fragments.cuh"

namespace pikv_ds {
namespace {

// Shared memory serves as many lanes at a time as make 128 bytes. The most different words that one
// bank must give to such a phase; address(lane) in bytes.
template <typename Address>
constexpr int WordsPerBank(int bytes_per_lane, const Address& address) {
  const int lanes = bytes_per_lane >= 4 ? 128 / bytes_per_lane : 32;
  int most = 0;
  for (int phase = 0; phase < 32; phase += lanes) {
    int words[32][32] = {}, counts[32] = {};
    for (int lane = phase; lane < phase + lanes; ++lane) {
      for (int byte = 0; byte < bytes_per_lane; byte += 4) {
        const int word = (address(lane) + byte) / 4;
        const int bank = word % 32;
        bool seen = false;
        for (int i = 0; i < counts[bank]; ++i) seen |= words[bank][i] == word;
        if (!seen) words[bank][counts[bank]++] = word;
        most = counts[bank] > most ? counts[bank] : most;
      }
    }
  }
  return most;
}

template <Element kElement, int kHeadDim>
constexpr bool ChannelsCoveredOnce() {
  using F = Fragments<kElement, kHeadDim>;
  int in_keys[kHeadDim] = {}, in_values[kHeadDim] = {};
  for (int step = 0; step < F::kSteps; ++step) {
    for (int c = 0; c < 4; ++c) {
      for (int i = 0; i < 4; ++i) ++in_keys[F::KeyChannel(step, c, i)];
    }
    for (int g = 0; g < 8; ++g) {
      for (int upper = 0; upper < 2; ++upper) ++in_values[F::ValueChannel(step, g, upper)];
    }
  }
  for (int d = 0; d < kHeadDim; ++d) {
    if (in_keys[d] != 1 || in_values[d] != 1) return false;
  }
  return true;
}

template <Element kElement, int kHeadDim>
constexpr bool Check() {
  if constexpr (TensorLayoutSupported(kElement, kHeadDim)) {
    using F = Fragments<kElement, kHeadDim>;
    static_assert(ChannelsCoveredOnce<kElement, kHeadDim>());
    if constexpr (F::kCoded) {
      constexpr int kKeyLoad = F::kKeyRun < 16 ? F::kKeyRun : 16;
      static_assert(WordsPerBank(kKeyLoad, [](int lane) {
                      return lane / 4 * F::kKeyPitch + F::KeyByte(0, lane % 4);
                    }) == 1);
      for (int i = 0; i < 4; ++i) {
        const int words = WordsPerBank(F::kValueRun, [i](int lane) {
          return (2 * (lane % 4) + i % 2 + 8 * (i / 2)) * F::kValuePitch +
                 F::ValueByte(0, lane / 4);
        });
        if (words != 1) return false;
      }
    } else {
      // ldmatrix reads 8 rows of 16 bytes at a time.
      static_assert(WordsPerBank(16, [](int lane) { return lane % 8 * F::kKeyPitch; }) == 1);
      static_assert(WordsPerBank(16, [](int lane) { return lane % 8 * F::kValuePitch; }) == 1);
    }
  }
  return true;
}

template <Element kElement>
constexpr bool CheckAll() {
  return Check<kElement, 64>() && Check<kElement, 80>() && Check<kElement, 96>() &&
         Check<kElement, 128>() && Check<kElement, 192>() && Check<kElement, 256>();
}

static_assert(CheckAll<Element::kBFloat16>());
static_assert(CheckAll<Element::kFloat16>());
static_assert(CheckAll<Element::kFp8>());
static_assert(CheckAll<Element::kInt8>());
static_assert(CheckAll<Element::kInt4>());
static_assert(CheckAll<Element::kInt2>());

}  // namespace
}  // namespace pikv_ds
