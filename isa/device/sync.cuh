// Every fence, atomic and spin by which actors wait for each other, each with the order it makes; those of a block's barriers are the
// weight feed's (sync_mbarrier.cuh, sync_words.cuh). Two others order nothing: the claim of an SM (kernel.cu) and the look at the
// host's abort word (actors.cuh).
#pragma once
#include "isa/device/types.cuh"
#include "isa/device/trace.cuh"

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---- giving up -------------------------------------------------------------------------------------------------------------------
// A wait that does not end reports itself in the launch's abort record and every other wait follows it out.

enum AbortCode : uint32_t { ABORT_NONE = 0, ABORT_TIMEOUT = 1, ABORT_HOST = 2, ABORT_PLACEMENT = 3, ABORT_MISMATCH = 4 };
enum Actor : uint32_t { FEEDER = 1, CONSUMER = 2, STORER = 3, WATCHER = 4, LAUNCH_END = 5 };
enum WaitKind : uint32_t { WAIT_TASK = 1, WAIT_TAG = 2, WAIT_FULL = 3, WAIT_EMPTY = 4, WAIT_SLOT = 5, WAIT_COUNTER = 6, WAIT_TOKEN_END = 7, WAIT_BARRIER = 8 };

struct Abort {
  uint32_t* record;  // global: code, actor << 8 | wait kind, SM, task, token, value seen
  uint32_t limit;    // polls after which a wait gives up
  uint32_t actor, sm, task, token;
};

__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Writes the abort record unless another thread was first. Arguments by value: an address taken here would cost every wait a stack frame.
__device__ __noinline__ void write_abort(uint32_t* record, uint32_t code, uint32_t actor_kind, uint32_t sm, uint32_t task, uint32_t token) {
  if (atomicCAS(record, 0u, code) == 0u) {
    record[1] = actor_kind;
    record[2] = sm;
    record[3] = task;
    record[4] = token;
  }
}
__device__ __forceinline__ void raise_abort(const Abort& a, uint32_t code, uint32_t kind) {
  write_abort(a.record, code, a.actor << 8 | kind, a.sm, a.task, a.token);
}

#ifdef DRAWS
// ---- the end of a launch at a stop token ---------------------------------------------------------------------------------------------
// The task that chose the token writes how many tokens the launch has, in place of handing the token on. What later tokens wait for never
// comes: waits of those tokens end, no others.

constexpr int END_WORD = 6;  // of the abort record

__device__ __forceinline__ void end_launch(const Abort& a, uint32_t tokens) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(a.record + END_WORD), "r"(tokens) : "memory");
}
__device__ __forceinline__ bool launch_ended(const Abort& a) {
  const uint32_t tokens = load_relaxed(a.record + END_WORD);
  return tokens != 0u && a.token >= tokens;
}
// A word in the host's memory, which the host reads while the launch runs.
__device__ __forceinline__ void store_for_host(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// One more in a word of shared memory; barriers order it.
__device__ __forceinline__ void count_shared(uint32_t* p) {
  asm volatile("red.relaxed.cta.shared::cta.add.u32 [%0], %1;" ::"r"(shared_address(p)), "r"(1u) : "memory");
}
#endif

// True when the wait must end: its polls ran out, or somebody aborted the launch. Looked at every 256 polls.
__device__ __forceinline__ bool must_give_up(const Abort& a, uint32_t polls, uint32_t kind) {
  if ((polls & 255u) != 0u) return false;
  if (load_relaxed(a.record) != 0u) return true;
#ifdef DRAWS
  if (launch_ended(a)) return true;
#endif
  if (polls < a.limit) return false;
  raise_abort(a, ABORT_TIMEOUT, kind);
  return true;
}

__device__ __forceinline__ void leave() {
  asm volatile("exit;");
  __builtin_unreachable();  // nothing need be kept for what would follow
}

#if STRESS
// A build for tests: each wait may be late by up to 4 us, differently for each actor, task and run.
__device__ __forceinline__ void stress_delay(const Abort& a) {
  uint32_t h = (uint32_t)clock64() ^ (a.sm * 0x9E3779B1u) ^ (a.task * 0x85EBCA77u) ^ (a.actor << 13);
  h ^= h >> 15;
  h *= 0x2C1B3C6Du;
  h ^= h >> 12;
  if ((h & 7u) == 0u) __nanosleep(h >> 20);
}
#endif

// Polls `ready` until it holds; false if the launch is being aborted.
template <class Ready>
__device__ __forceinline__ bool poll_until(const Abort& a, uint32_t kind, Ready ready) {
#if STRESS
  stress_delay(a);
#endif
  TRACE(const uint64_t since = clock64();)
  uint32_t polls = 0;
  while (!ready())
    if (must_give_up(a, ++polls, kind)) return false;
  TRACE(if (polls) trace_wait(a.sm, kind, a.task, a.token, since);)
  return true;
}

// The same for actors that own nothing in flight: the thread exits when the launch is aborted.
template <class Ready>
__device__ __forceinline__ void wait_until(const Abort& a, uint32_t kind, Ready ready) {
  if (!poll_until(a, kind, ready)) leave();
}

// ---- words in shared memory that only grow -----------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t load_shared_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(shared_address(p)), "r"(v) : "memory");
}
__device__ __forceinline__ void add_shared_release(uint32_t* p, uint32_t v) {
  asm volatile("red.release.cta.shared::cta.add.u32 [%0], %1;" ::"r"(shared_address(p)), "r"(v) : "memory");
}

// ---- packets: {32-bit value, 32-bit tag} in one relaxed 64-bit access; the tag orders the value, nothing else -------------------------

__device__ __forceinline__ uint2 load_packet(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return make_uint2((uint32_t)v, (uint32_t)(v >> 32));
}
// Two neighbouring packets; each is one access of its own.
__device__ __forceinline__ uint4 load_packets(const uint64_t* p) {
  uint64_t a, b;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(p) : "memory");
  return make_uint4((uint32_t)a, (uint32_t)(a >> 32), (uint32_t)b, (uint32_t)(b >> 32));
}
__device__ __forceinline__ void load_into(uint2& v, const uint64_t* p) { v = load_packet(p); }
__device__ __forceinline__ void load_into(uint4& v, const uint64_t* p) { v = load_packets(p); }
__device__ __forceinline__ void publish(uint64_t* p, uint32_t value, uint32_t tag) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"((uint64_t)tag << 32 | value) : "memory");
}

// Two neighbouring ones; each is one access of its own.
__device__ __forceinline__ void publish_pair(uint64_t* p, uint32_t first, uint32_t second, uint32_t tag) {
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(p), "l"((uint64_t)tag << 32 | first),
               "l"((uint64_t)tag << 32 | second)
               : "memory");
}

// What a read expects: tags must equal `tag` under `mask` (mask 0: not checked).
struct Expected {
  uint32_t tag, mask;
  __device__ __forceinline__ bool match(uint32_t seen) const { return ((seen ^ tag) & mask) == 0; }
  __device__ __forceinline__ bool match(const uint2& packet) const { return match(packet.y); }
  __device__ __forceinline__ bool match(const uint4& packets) const { return (((packets.y ^ tag) | (packets.w ^ tag)) & mask) == 0; }
};

// Asks for the line at `p` without waiting for it.
__device__ __forceinline__ void touch(const void* p) {
  uint32_t unused;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(unused) : "l"(p) : "memory");
}

// ---- counters: relaxed hints that only grow; compared modulo 2^32 ---------------------------------------------------------------------

__device__ __forceinline__ void add_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ bool reached(uint32_t value, uint32_t threshold) { return (int32_t)(value - threshold) >= 0; }

// ---- end of token: everything the SM wrote is visible to who acquires it -----------------------------------------------------------------

__device__ __forceinline__ void add_release(uint32_t* p, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
