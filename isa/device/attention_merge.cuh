// Attention's end: partial results of warps, and of splits on other SMs, become one, always in the same order, and are published.
#pragma once
#include "isa/device/attention_softmax.cuh"

// Softmax partials of one head and of NARROW dims: maximum (base 2), sum and values. Of several, all are read before any is weighed, so a
// merge costs one latency and not one for each.
struct Partial {
  float m = NEG_INF, l = 0.f, o[NARROW] = {};
  __device__ __forceinline__ void weigh(float top) {
    const float scale = fast_exp2(m - top);
    m = top;
    l *= scale;
#pragma unroll
    for (int e = 0; e < NARROW; ++e) o[e] *= scale;
  }
  __device__ __forceinline__ void add(const Partial& other) {  // of the same maximum
    l += other.l;
#pragma unroll
    for (int e = 0; e < NARROW; ++e) o[e] += other.o[e];
  }
};
template <int N>
__device__ __forceinline__ Partial merge(Partial (&parts)[N]) {
  float top = parts[0].m;
#pragma unroll
  for (int i = 1; i < N; ++i) top = fmaxf(top, parts[i].m);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    parts[i].weigh(top);
    if (i) parts[0].add(parts[i]);
  }
  return parts[0];
}

// The warps' partials of elements [d, d + NARROW) of a head, in warp order, and on the tail that of the new row. A warp without blocks has an
// empty one, so nothing here depends on how many have some.
template <bool TAIL>
__device__ __forceinline__ Partial merge_warps(const AttentionScratch& s, int head, int d) {
  constexpr int N = CONSUMER_WARPS + TAIL;
  Partial parts[N];
#pragma unroll
  for (int w = 0; w < N; ++w) {
    const float* from = s.partial(w, head);
    const float2 weight = *reinterpret_cast<const float2*>(from);
    parts[w].m = weight.x;
    parts[w].l = weight.y;
    if constexpr (NARROW == 2) {
      const float2 v = *reinterpret_cast<const float2*>(from + PARTIAL_HEAD + d);
      parts[w].o[0] = v.x;
      parts[w].o[NARROW - 1] = v.y;
    } else {
      parts[w].o[0] = from[PARTIAL_HEAD + d];
    }
  }
  return merge(parts);
}

// Threads that share the merge of one (head, dims): neighbours, each with its share of the splits.
constexpr int PER_HEAD = HEAD_DIM / NARROW;
constexpr int sharers(int free) { return free >= 8 ? 8 : free >= 4 ? 4 : free >= 2 ? 2 : 1; }
constexpr int SHARERS = sharers(CONSUMER_THREADS / (GROUP * PER_HEAD));
constexpr int SPLITS_AT_ONCE = 4;

// The other splits' partials that fall to this thread: splits `first`, first + SHARERS, ... of `count`, in that order.
__device__ __forceinline__ Partial merge_splits(Consumer& c, const uint64_t* part, int stride, int first, int count, int d, Expected want) {
  Partial total;
#pragma unroll 1
  for (int base = first; base < count; base += SHARERS * SPLITS_AT_ONCE) {
    // Maximum and sum, then the values; what is beyond the last split reads that one again.
    uint4 v[2 * SPLITS_AT_ONCE];
    c.read_all(v, want, [&](int i) {
      const uint64_t* from = part + min_of(base + i / 2 * SHARERS, count - 1) * stride;
      return i % 2 ? from + PARTIAL_HEAD + d / 2 * 2 : from;
    });
    Partial parts[SPLITS_AT_ONCE + 1];
#pragma unroll
    for (int i = 0; i < SPLITS_AT_ONCE; ++i) {
      if (base + i * SHARERS >= count) continue;
      parts[i].m = as_float(v[2 * i].x);
      parts[i].l = as_float(v[2 * i].z);
      parts[i].o[0] = as_float(NARROW == 1 && d % 2 ? v[2 * i + 1].z : v[2 * i + 1].x);
      if constexpr (NARROW == 2) parts[i].o[NARROW - 1] = as_float(v[2 * i + 1].z);
    }
    parts[SPLITS_AT_ONCE] = total;
    total = merge(parts);
  }
  return total;
}

// Neighbouring threads' shares of one (head, dims) become one.
__device__ __forceinline__ Partial merge_sharers(Partial mine) {
#pragma unroll
  for (int x = 1; x < SHARERS; x <<= 1) {
    Partial parts[2];
    parts[0] = mine;
    parts[1].m = __shfl_xor_sync(~0u, mine.m, x);
    parts[1].l = __shfl_xor_sync(~0u, mine.l, x);
#pragma unroll
    for (int e = 0; e < NARROW; ++e) parts[1].o[e] = __shfl_xor_sync(~0u, mine.o[e], x);
    mine = merge(parts);
  }
  return mine;
}

__device__ __forceinline__ void publish_partial(const Consumer& c, const AttentionTask& task, const AttentionScratch& s, uint64_t* out,
                                                uint32_t tag) {
  const int size = HEAD_DIM + PARTIAL_HEAD;
  for (int i = c.warp * 32 + c.lane; i < task.nq * PER_HEAD; i += CONSUMER_THREADS) {
    const int head = i / PER_HEAD, d = i % PER_HEAD * NARROW;
    const Partial merged = merge_warps<false>(s, head, d);
    if (d == 0) {
      publish(out + head * size, as_bits(merged.m), tag);
      publish(out + head * size + 1, as_bits(merged.l), tag);
    }
#pragma unroll
    for (int e = 0; e < NARROW; ++e) publish(out + head * size + PARTIAL_HEAD + d + e, as_bits(merged.o[e]), tag);
  }
}

// Elements of the output: values over the sum.
__device__ __forceinline__ void publish_weighed(uint64_t* out, const Partial& all, uint32_t tag) {
  const float inverse = __fdividef(1.f, all.l);
  if constexpr (WIDE) publish(out, as_bits(all.o[0] * inverse), tag);
  else publish(out, pack2(all.o[0] * inverse, all.o[NARROW - 1] * inverse), tag);
}

__device__ __forceinline__ void publish_output(Consumer& c, const AttentionTask& task, const AttentionScratch& s,
                                               const uint64_t* partials, int others, const Token& token) {
  const int size = HEAD_DIM + PARTIAL_HEAD, thread = c.warp * 32 + c.lane, share = thread % SHARERS;
  uint64_t* out = c.b.buffer(task.out_buf) + task.q0 * PER_HEAD;
  const uint32_t tag = token.tag(task.out_tag);
  if (others == 0) {  // no other split: a short way, for it is one of the chain of boundaries
#pragma unroll 1
    for (int i = thread; i < task.nq * PER_HEAD; i += CONSUMER_THREADS)
      publish_weighed(out + i, merge_warps<true>(s, i / PER_HEAD, i % PER_HEAD * NARROW), tag);
    return;
  }
  constexpr int ROUNDS = ceil_div(GROUP * PER_HEAD * SHARERS, CONSUMER_THREADS);
  Partial merged[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int i = (thread + round * CONSUMER_THREADS) / SHARERS, head = i / PER_HEAD, d = i % PER_HEAD * NARROW;
    const bool mine = i < task.nq * PER_HEAD;
    if (mine && share < others)
      merged[round] = merge_splits(c, partials + head * size, task.nq * size, share, others, d, token.expect(task.part_tag));
    __syncwarp();
    if (mine && share == 0) {
      Partial both[2] = {merge_warps<true>(s, head, d), merged[round]};
      merged[round] = merge(both);
    }
    __syncwarp();
    merged[round] = merge_sharers(merged[round]);
  }
  c.meet();  // every read of the task comes before its first publish
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int i = (thread + round * CONSUMER_THREADS) / SHARERS;
    if (share == 0 && i < task.nq * PER_HEAD) publish_weighed(out + i, merged[round], tag);
  }
}
