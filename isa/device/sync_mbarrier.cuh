// Barriers of a block as mbarriers: they order its shared memory (release on arrive, acquire on wait, CTA scope).
#pragma once
#include "isa/device/sync.cuh"

using Barrier = uint64_t;

__device__ __forceinline__ void barrier_init(Barrier* bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count));
}
__device__ __forceinline__ void barrier_arrive(Barrier* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

// ---- for bulk copies: compute capability 9.0

// The phase of this parity has ended; the hardware may hold the thread for a while until it has.
__device__ __forceinline__ bool try_barrier(Barrier* bar, uint32_t parity) {
  uint32_t ok;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(ok)
      : "r"(shared_address(bar)), "r"(parity)
      : "memory");
  return ok != 0;
}
// The same without waiting a moment for it: for an answer that is needed later.
__device__ __forceinline__ bool test_barrier_now(Barrier* bar, uint32_t parity) {
  uint32_t ok;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(ok)
      : "r"(shared_address(bar)), "r"(parity)
      : "memory");
  return ok != 0;
}
// The copy engine sees the barriers that this thread has initialised.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives; the phase ends when bulk copies have written `bytes` more.
__device__ __forceinline__ void barrier_expect(Barrier* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
// Ordinary writes acquired by this thread are visible to the bulk copies it starts next.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }

// ---- for cp.async: compute capability 8.0

// The phase of this parity has ended. Parities are constants: of one in a register ptxas keeps a copy for every place that waits, for the kernel's
// whole life, where mbarriers are not the hardware's own.
__device__ __forceinline__ bool test_barrier(Barrier* bar, uint32_t parity) {
  uint32_t ok;
  asm volatile(
      "{\n.reg .pred p, odd;\nsetp.ne.u32 odd, %2, 0;\n"
      "@odd mbarrier.test_wait.parity.shared::cta.b64 p, [%1], 1;\n"
      "@!odd mbarrier.test_wait.parity.shared::cta.b64 p, [%1], 0;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(ok)
      : "r"(shared_address(bar)), "r"(parity)
      : "memory");
  return ok != 0;
}
// One of the arrivals that the barrier counts, made when every cp.async that this thread has started has landed.
__device__ __forceinline__ void barrier_arrive_after_copies(Barrier* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}
