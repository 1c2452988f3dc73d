// Bulk copies: a lane starts each, the copy engine moves the bytes and counts them at the barrier.
#pragma once
#include "isa/device/sync_mbarrier.cuh"

constexpr int FEEDER_LANES = GATED ? 32 : 1, FULL_ARRIVALS = 1;  // chunks of a stretch are many pieces: a lane each
constexpr bool PIECE_A_LANE = true;

__device__ __forceinline__ void barrier_init_done() { fence_barrier_init(); }
__device__ __forceinline__ bool barrier_passed(Barrier* bar, uint32_t parity) { return try_barrier(bar, parity); }
__device__ __forceinline__ bool barrier_tested(Barrier* bar, uint32_t parity) { return test_barrier_now(bar, parity); }

__device__ __forceinline__ void begin_copies(Barrier& full, uint32_t bytes) {
  if (FEEDER_LANES > 1 && (threadIdx.x & 31) != 0) return;
#if DRY_FEED
  barrier_arrive(&full);
#else
  barrier_expect(&full, bytes);
#endif
}
__device__ __forceinline__ void copy_piece(Barrier& full, uint8_t* to, const uint8_t* from, uint32_t bytes) {
#if !DRY_FEED
#if EVICT_FIRST
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                   shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(&full)), "l"(policy)
               : "memory");
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&full))
               : "memory");
#endif
#endif
}
__device__ __forceinline__ void end_copies(Barrier&) {}
// The copy engine reads through a proxy of its own.
__device__ __forceinline__ void order_copies() { fence_async_proxy(); }
