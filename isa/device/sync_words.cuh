// Barriers of a block as words of shared memory, where there are no mbarriers: the same order (release on arrive, acquire on wait, CTA scope).
#pragma once
#include "isa/device/sync.cuh"

// Arrivals add `step`, a share of 2^31, so that a phase's last one flips the upper bit of `phase`: the parity of the phase under way.
struct Barrier {
  uint32_t phase, step;
};
static_assert((CONSUMER_WARPS & (CONSUMER_WARPS - 1)) == 0, "arrivals of a phase must divide 2^31");

__device__ __forceinline__ void barrier_init(Barrier* bar, uint32_t count) {
  bar->phase = 0;
  bar->step = 0x80000000u / count;
}
__device__ __forceinline__ void barrier_arrive(Barrier* bar) { add_shared_release(&bar->phase, bar->step); }
// The phase of this parity has ended.
__device__ __forceinline__ bool barrier_passed(const Barrier* bar, uint32_t parity) {
  return load_shared_acquire(&bar->phase) >> 31 != parity;
}
__device__ __forceinline__ bool barrier_tested(const Barrier* bar, uint32_t parity) { return barrier_passed(bar, parity); }
