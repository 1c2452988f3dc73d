// sample: one warp picks the best candidate, publishes the token and hands it to the host.
#pragma once
#include "isa/gemv_head.cuh"

__device__ __forceinline__ void consume_sample(Consumer& c, const SampleTask& task, const Token& token) {
  const Block& b = c.b;
  c.wait_released();
  if (c.warp == 0) {
    const uint64_t* in = b.buffer(task.in_buf);
    const Expected want = token.expect(task.in_tag);
    float best = -__int_as_float(0x7f800000);
    int row = 0x7fffffff;
    for (int i = c.lane; i < task.count; i += 32) {
      uint4 v = load_packets(in + 2 * i);
      c.settle(v, in + 2 * i, want);
      keep_best(best, row, as_float(v.x), (int)v.z);
    }
    __syncwarp();
    warp_best(best, row);
    if (c.lane == 0) {
      publish(b.buffer(task.out_buf), (uint32_t)row, token.tag(task.out_tag));
      reinterpret_cast<int32_t*>(b.p.tokens_out)[token.step] = row;
    }
  }
  c.arrive_done(task.done_counter);
}
