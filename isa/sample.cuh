// sample: one warp picks the best candidate, publishes the token and hands it to the host.
#pragma once
#include "isa/gemv_head.cuh"

// The row of the best of `count` candidates at `in`. By a whole warp.
__device__ __forceinline__ int best_candidate(Consumer& c, const uint64_t* in, Expected want, int count) {
  float best = -__int_as_float(0x7f800000);
  int row = 0x7fffffff;
  constexpr int AT_ONCE = 8;
  for (int base = c.lane; base < count; base += 32 * AT_ONCE) {
    uint4 v[AT_ONCE];
    c.read_all(v, want, [&](int j) { return in + 2 * min_of(base + 32 * j, count - 1); });
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) keep_best(best, row, as_float(v[j].x), (int)v[j].z);  // the last one again changes nothing
  }
  __syncwarp();
  warp_best(best, row);
  return row;
}

__device__ __forceinline__ void consume_sample(Consumer& c, const SampleTask& task, const Token& token) {
  const Block& b = c.b;
  c.wait_released();
  if (c.warp == 0) {
    const int row = best_candidate(c, b.buffer(task.in_buf), token.expect(task.in_tag), task.count);
    if (c.lane == 0) {
      publish(b.buffer(task.out_buf), (uint32_t)row, token.tag(task.out_tag));
      reinterpret_cast<int32_t*>(b.p.tokens_out)[token.step] = row;
    }
  }
  c.arrive_done(task.done_counter);
}
