// Chunks of weight elements on their way from the ring into a consumer warp's registers.
#pragma once
#include "isa/device/block.cuh"
#include "isa/device/plan.cuh"

// Fragments of the next chunks that are this warp's, in registers: the first of a task are fetched before x is there, so the ring has room for
// as many more while a boundary is waited for, and no product waits for shared memory. A chunk always has the same registers.
// `MOST`: chunks that registers have room for while x is read.
template <class P, int MOST>
struct Fetched {
  static constexpr int DEPTH = MOST >= 4 && P::CHUNKS % 4 == 0 ? 4 : MOST >= 3 && P::CHUNKS % 3 == 0 ? 3 : MOST >= 2 && P::CHUNKS % 2 == 0 ? 2 : 1;
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

// Multiplies the fetched chunks of a tile, from number `first` on, and fetches as many of those that follow; the last ones of a task have
// none that follow (`MORE`). Without looking at the ring for each, where all are known to have `LANDED`, and with one release for all.
template <bool MORE, bool LANDED, class P, class F, class O, class S>
__device__ __forceinline__ void multiply_fetched(Consumer& c, F& chunks, const O& operands, S& sums, int first) {
  uint32_t read = 0;
  const uint32_t from = c.slot;
#pragma unroll
  for (int d = 0; d < F::DEPTH; ++d) {
    const int k = first + d, next = k + F::DEPTH;
    chunks.each(d, k + 1 == P::CHUNKS, [&](int j, const uint4& a) { sums.add(j, a, operands.at(k * P::PER_CHUNK + j)); });
    if constexpr (MORE) read |= chunks.template fetch<LANDED>(c, d, next + 1 == P::CHUNKS || next + 1 == 2 * P::CHUNKS, LANDED);
  }
  if constexpr (MORE && LANDED) c.template release_chunks<F::DEPTH>(from, read);
}

// The products of a tile, whose first chunks are in registers, as those of the next tile are when it ends. `O::KEPT`: operands are in registers
// too, so that which are meant must be known to the compiler. `known`: whether the chunks after the first have `landed` has been looked at.
template <class P, class F, class O, class S>
__device__ __forceinline__ void multiply_tile(Consumer& c, F& chunks, const O& operands, S& sums, bool is_last, bool known = false,
                                              bool landed = false) {
#pragma unroll(O::KEPT ? P::CHUNKS : 1)
  for (int first = 0; first < P::CHUNKS; first += F::DEPTH) {
    const bool more = first + F::DEPTH < P::CHUNKS || !is_last;
    if (!more) multiply_fetched<false, false, P>(c, chunks, operands, sums, first);
    else if (known && first == 0 ? landed : c.chunks_landed<F::DEPTH>()) multiply_fetched<true, true, P>(c, chunks, operands, sums, first);
    else multiply_fetched<true, false, P>(c, chunks, operands, sums, first);
  }
}
