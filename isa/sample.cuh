// sample: one warp picks the best candidate, publishes the token and hands it to the host. In a program that draws, it may end the launch.
#pragma once
#ifdef DRAWS
#include "isa/device/sampling.cuh"
#endif
#include "isa/gemv_head.cuh"

__device__ __forceinline__ void consume_sample(Consumer& c, const SampleTask& task, const Token& token) {
  const Block& b = c.b;
  c.wait_released();
  if (c.warp == 0) {
    const uint64_t* in = b.buffer(task.in_buf);
    const Expected want = token.expect(task.in_tag);
#ifdef DRAWS
    const int32_t stop = stop_token(b.p, c.lane);
#endif
    float best = -__int_as_float(0x7f800000);
    int row = 0x7fffffff;
    constexpr int AT_ONCE = 8;
    for (int base = c.lane; base < task.count; base += 32 * AT_ONCE) {
      uint4 v[AT_ONCE];
      c.read_all(v, want, [&](int j) { return in + 2 * min_of(base + 32 * j, task.count - 1); });
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) keep_best(best, row, as_float(v[j].x), (int)v[j].z);  // the last one again changes nothing
    }
    __syncwarp();
    warp_best(best, row);
#ifdef DRAWS
    choose_token(c, row, stop, b.buffer(task.out_buf), token.tag(task.out_tag), token);
#else
    if (c.lane == 0) {
      publish(b.buffer(task.out_buf), (uint32_t)row, token.tag(task.out_tag));
      reinterpret_cast<int32_t*>(b.p.tokens_out)[token.step] = row;
    }
#endif
  }
  c.arrive_done(task.done_counter);
}
