// The owners of pages, one page after the other.
#include "../launch.h"

namespace pikv_ds {

void PlacePagesCpu(const PlacePagesParams& p) {
  for (int64_t n = 0; n < p.num_pages; ++n) {
    int32_t* const loads = p.loads + p.groups[n] * p.num_ranks;
    const auto has_room = [&](int64_t rank) {
      return loads[rank] < p.limits[n] - (rank == p.source) && p.free[rank] > 0;
    };
    int64_t owner = -1;
    const int32_t* const wanted = p.preference + n * p.num_ranks;
    for (int64_t i = 0; i < p.num_ranks && wanted[i] >= 0 && owner < 0; ++i) {
      if (has_room(wanted[i])) owner = wanted[i];
    }
    if (owner < 0) {  // the least loaded one
      for (int64_t rank = 0; rank < p.num_ranks; ++rank) {
        if (has_room(rank) && (owner < 0 || loads[rank] < loads[owner])) owner = rank;
      }
    }
    if (owner >= 0) {
      ++loads[owner];
      --p.free[owner];
    }
    p.out[n] = static_cast<int32_t>(owner);
  }
}

}  // namespace pikv_ds
