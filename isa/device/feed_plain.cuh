// Loads into registers and stores into the stage: what every card can do. A chunk has landed when its copies end: one is under way at a time.
#pragma once
#include "isa/device/sync_words.cuh"

constexpr int FEEDER_LANES = 32, FULL_ARRIVALS = 1;
constexpr bool PIECE_A_LANE = false;

__device__ __forceinline__ void barrier_init_done() {}  // the __syncthreads that follows is enough

__device__ __forceinline__ uint4 load_streamed(const uint8_t* from) {
  uint4 v;
#if EVICT_FIRST
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
#else
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
#endif
  return v;
}

__device__ __forceinline__ void begin_copies(Barrier&, uint32_t) {}
__device__ __forceinline__ void copy_piece(Barrier&, uint8_t* to, const uint8_t* from, uint32_t bytes) {
#if !DRY_FEED
  constexpr int AT_ONCE = 16, STEP = 32 * 16;  // 8 KiB of the warp are in flight
#pragma unroll 1
  for (uint32_t base = (threadIdx.x & 31) * 16; base < bytes; base += AT_ONCE * STEP) {
    uint4 v[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) v[i] = load_streamed(from + min(base + i * STEP, bytes - 16));  // past the end the last bytes again
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (base + i * STEP < bytes) *reinterpret_cast<uint4*>(to + base + i * STEP) = v[i];
  }
#endif
}
__device__ __forceinline__ void end_copies(Barrier& full) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) barrier_arrive(&full);
}
// These are ordinary loads.
__device__ __forceinline__ void order_copies() {}
