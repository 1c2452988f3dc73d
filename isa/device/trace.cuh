// A build that writes down when each actor begins a task and how long it waits. In any other build TRACE(x) is nothing, and so is this file.
#pragma once
#ifndef AMK_TRACE
#define TRACE(...)
#else
#define TRACE(...) __VA_ARGS__

// AMK_TRACE is the number of events that there is room for a warp; those that come later are counted and lost.
constexpr uint32_t TRACE_TASK_BEGINS = 255;  // other kinds are those of waits
constexpr uint32_t TRACE_WARPS = CONSUMER_WARPS + 3;

struct TraceEvent {
  uint64_t clock;  // the SM's cycles when the task began, or when the wait did
  uint32_t value;  // low word of the card's nanoseconds when the task began, or the cycles of the wait
  uint16_t task;
  uint8_t kind, token;
};
static_assert(sizeof(TraceEvent) == 16, "the host reads events of 16 bytes");
extern "C" __device__ TraceEvent* amk_trace_events = nullptr;  // [SMS][TRACE_WARPS][AMK_TRACE]
extern "C" __device__ uint32_t* amk_trace_counts = nullptr;    // [SMS][TRACE_WARPS]

// How many events each warp of the block has written; the last words of the space for barriers.
__device__ __forceinline__ uint32_t* trace_counts() {
  extern __shared__ __align__(1024) uint8_t shared[];
  return reinterpret_cast<uint32_t*>(shared + BARRIER_OFFSET + BARRIER_BYTES) - TRACE_WARPS;
}
__device__ __forceinline__ void trace_begin() {
  for (uint32_t i = 0; i < TRACE_WARPS; ++i) trace_counts()[i] = 0;
}

// One of the lanes that come here together writes: lanes that wait for different packets are apart. The count orders nothing but itself.
__device__ __noinline__ void trace_event(uint32_t sm, uint32_t kind, uint32_t task, uint32_t token, uint64_t clock, uint32_t value) {
  if ((threadIdx.x & 31u) != __ffs(__activemask()) - 1u) return;
  const uint32_t warp = threadIdx.x >> 5, at = sm * TRACE_WARPS + warp;
  const uint32_t n = atomicAdd(trace_counts() + warp, 1u);
  if (n < AMK_TRACE) amk_trace_events[(uint64_t)at * AMK_TRACE + n] = TraceEvent{clock, value, (uint16_t)task, (uint8_t)kind, (uint8_t)token};
  amk_trace_counts[at] = n + 1;
}
__device__ __forceinline__ void trace_wait(uint32_t sm, uint32_t kind, uint32_t task, uint32_t token, uint64_t since) {
  trace_event(sm, kind, task, token, since, (uint32_t)(clock64() - since));
}
__device__ __forceinline__ void trace_task(uint32_t sm, uint32_t task, uint32_t token) {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  trace_event(sm, TRACE_TASK_BEGINS, task, token, clock64(), (uint32_t)ns);
}
#endif
