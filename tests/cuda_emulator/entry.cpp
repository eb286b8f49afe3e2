// C entry points to the kernels on the emulator, for ctypes: each takes the address of its params.
#include "../../csrc/launch.h"

#define PIKV_ENTRY(Op) \
  extern "C" void Op(const pikv_ds::Op##Params* params) { pikv_ds::Op##Cuda(*params, nullptr); }

PIKV_ENTRY(SealPages)
PIKV_ENTRY(GatherPages)
PIKV_ENTRY(ScatterPages)
PIKV_ENTRY(DecodeAttention)
PIKV_ENTRY(PrefillAttention)
PIKV_ENTRY(TailAttention)
PIKV_ENTRY(AppendTokens)
PIKV_ENTRY(AppendExperts)
PIKV_ENTRY(MergePartials)
PIKV_ENTRY(PageScores)
PIKV_ENTRY(SubpageScores)
PIKV_ENTRY(SelectPages)
PIKV_ENTRY(UpdateUtility)
PIKV_ENTRY(ChooseVictims)

extern "C" int64_t DecodeScratchFloats(const pikv_ds::DecodeAttentionParams* params) {
  return pikv_ds::DecodeScratchFloats(*params);
}
extern "C" int64_t ChooseVictimsScratchBytes(const pikv_ds::ChooseVictimsParams* params) {
  return pikv_ds::ChooseVictimsScratchBytes(*params);
}
