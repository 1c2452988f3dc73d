// A batch: BATCH tokens computed side by side, each in a seat (isa/batch.py says how their values lie in the arena).
#pragma once
#include "isa/device/block.cuh"

static_assert(BATCH % 8 == 0, "seats come in blocks of 8, the columns of a product");
static_assert(!WIDE, "a batch needs elements of 16 bits");
constexpr int SEAT_BLOCKS = BATCH / 8;

// The token as attention sees it: at the position of its seat, which the plane of its KV rows names.
__device__ __forceinline__ Token seat_token(const Params& p, uint32_t plane, Token token) {
  token.position = __ldg(reinterpret_cast<const uint32_t*>(p.positions) + plane / LAYERS) + token.step;
  return token;
}

// An interleaved value is runs of 8 elements of 8 seats: 32 packets. Elements 4 `quarter` to 4 `quarter` + 3 of seat g are two packets from this one.
__device__ __forceinline__ int narrow_packet(int run, int block, int g, int quarter) {
  return (run * SEAT_BLOCKS + block) * 32 + g * 4 + quarter * 2;
}

// Waits for packets that have been asked for, all lanes of a warp together: none goes on before the packets of all are there. Lanes that went on
// by themselves would be at a product apart. For any actor.
template <int N, class At>
__device__ __forceinline__ void wait_together(const Abort& abort, uint4 (&v)[N], Expected want, At at) {
  auto all_here = [&] {
    bool all = true;
#pragma unroll
    for (int i = 0; i < N; ++i) all &= want.match(v[i]);
    return __all_sync(~0u, all) != 0;
  };
  if (all_here()) return;
  wait_until(abort, WAIT_TAG, [&] {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (!want.match(v[i])) load_into(v[i], at(i));
    return all_here();
  });
}
template <int N, class At>
__device__ __forceinline__ void read_pairs_together(const Abort& abort, uint4 (&v)[N], Expected want, At at) {
#pragma unroll
  for (int i = 0; i < N; ++i) load_into(v[i], at(i));
  wait_together(abort, v, want, at);
}

// The reduction slots of a batch: for each warp and seat 16 rows and the sum of squares.
__device__ __forceinline__ float* seat_partial(const Block& b, uint32_t slot, int warp) {
  return reinterpret_cast<float*>(b.shared + REDUCTION_OFFSET) + (slot * CONSUMER_WARPS + warp) * SLOT_ROW * BATCH;
}
