// cp.async: every lane of the warp copies 16 bytes at a time, and arrives at the barrier when its part of the chunk has landed.
#pragma once
#include "isa/device/sync_mbarrier.cuh"

constexpr int FEEDER_LANES = 32, FULL_ARRIVALS = 32;
constexpr bool PIECE_A_LANE = false;

__device__ __forceinline__ void barrier_init_done() {}  // the __syncthreads that follows is enough
__device__ __forceinline__ bool barrier_passed(Barrier* bar, uint32_t parity) { return test_barrier(bar, parity); }
__device__ __forceinline__ bool barrier_tested(Barrier* bar, uint32_t parity) { return test_barrier(bar, parity); }

__device__ __forceinline__ void begin_copies(Barrier&, uint32_t) {}
__device__ __forceinline__ void copy_piece(Barrier&, uint8_t* to, const uint8_t* from, uint32_t bytes) {
#if !DRY_FEED
#if EVICT_FIRST
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
#pragma unroll 4
  for (uint32_t at = (threadIdx.x & 31) * 16; at < bytes; at += 32 * 16) {
#if EVICT_FIRST
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to + at)), "l"(from + at), "l"(policy)
                 : "memory");
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + at)), "l"(from + at) : "memory");
#endif
  }
#endif
}
__device__ __forceinline__ void end_copies(Barrier& full) {
#if DRY_FEED
  barrier_arrive(&full);
#else
  barrier_arrive_after_copies(&full);
#endif
}
// These copies read as ordinary loads do.
__device__ __forceinline__ void order_copies() {}
