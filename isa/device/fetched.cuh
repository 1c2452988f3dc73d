// Chunks of weight elements on their way from the ring into a consumer warp's registers.
#pragma once
#include "isa/device/block.cuh"
#include "isa/device/plan.cuh"

// Fragments of the next chunks that are this warp's, in registers: the first of a task are fetched before x is there, so the ring has room for
// as many more while a boundary is waited for, and no product waits for shared memory. A chunk always has the same registers.
// `MOST`: chunks that registers have room for while x is read.
template <class P, int MOST>
struct Fetched {
  static constexpr int DEPTH = MOST >= 4 && P::CHUNKS % 4 == 0 ? 4 : MOST >= 3 && P::CHUNKS % 3 == 0 ? 3 : P::CHUNKS % 2 == 0 ? 2 : 1;
  static constexpr bool UNIFORM = P::HIGH_WARPS == 0 && P::LAST_HIGH == P::PER_CHUNK;  // the last chunk of a tile is as the others
  uint4 a[DEPTH][P::PER_CHUNK];
  const int last, last_at;  // fragments of this warp in the last chunk of a tile, and where they begin

  __device__ __forceinline__ Fetched(int warp)
      : last(warp < P::HIGH_WARPS ? P::LAST_HIGH : P::LAST_LOW),
        last_at((warp * P::LAST_LOW + min_of(warp, P::HIGH_WARPS)) * FRAGMENT_BYTES) {}
  __device__ __forceinline__ bool has(int j, bool is_last) const { return UNIFORM || !is_last || j < last; }
  // Waits for the next chunk in the ring, reads it and frees its slot.
  template <bool HOLD = false>
  __device__ __forceinline__ uint32_t fetch(Consumer& c, int slot, bool is_last, bool landed = false) {
    const int at = !UNIFORM && is_last ? last_at : c.warp * P::PER_CHUNK * FRAGMENT_BYTES;
    const uint8_t* from = c.wait_chunk(landed) + at + c.lane * 16;
    uint32_t read = 0;
#pragma unroll
    for (int j = 0; j < P::PER_CHUNK; ++j) {
      a[slot][j] = has(j, is_last) ? *reinterpret_cast<const uint4*>(from + j * FRAGMENT_BYTES) : uint4{};
      read |= a[slot][j].x;
    }
    if constexpr (!HOLD) c.release_chunk(read);
    return read;
  }
  // visit(j, fragment) for the warp's fragments of the chunk in `slot`.
  template <class Visit>
  __device__ __forceinline__ void each(int slot, bool is_last, Visit visit) const {
#pragma unroll
    for (int j = 0; j < P::PER_CHUNK; ++j)
      if (has(j, is_last)) visit(j, a[slot][j]);
  }
};
