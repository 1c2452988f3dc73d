// sample_batch: each warp picks the best candidates of its seats; tokens are published and handed to the host once all have been read.
#pragma once
#include "isa/device/batch.cuh"
#include "isa/device/best.cuh"

__device__ __forceinline__ void consume_sample_batch(Consumer& c, const SampleBatchTask& task, const Token& token) {
  constexpr int SEATS = ceil_div(BATCH, CONSUMER_WARPS), AT_ONCE = 8;  // seats of a warp
  const Block& b = c.b;
  const uint64_t* in = b.buffer(task.in_buf);
  const Expected want = token.expect(task.in_tag);
  int chosen[SEATS];
  c.wait_released();
#pragma unroll
  for (int i = 0; i < SEATS; ++i) {
    const int seat = min_of(c.warp + i * CONSUMER_WARPS, BATCH - 1);
    float best = -__int_as_float(0x7f800000);
    chosen[i] = 0x7fffffff;
    for (int base = c.lane; base < task.count; base += 32 * AT_ONCE) {
      uint4 v[AT_ONCE];
      c.read_all(v, want, [&](int j) { return in + 2 * (min_of(base + 32 * j, task.count - 1) * BATCH + seat); });
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) keep_best(best, chosen[i], as_float(v[j].x), (int)v[j].z);  // the last one again changes nothing
    }
    __syncwarp();
    warp_best(best, chosen[i]);
  }
  c.meet();  // every read of the task comes before its first publish
#pragma unroll
  for (int i = 0; i < SEATS; ++i) {
    const int seat = c.warp + i * CONSUMER_WARPS;
    if (c.lane != 0 || seat >= BATCH) continue;
    publish(b.buffer(task.out_buf) + seat, (uint32_t)chosen[i], token.tag(task.out_tag));
    reinterpret_cast<int32_t*>(b.p.tokens_out)[(uint64_t)token.step * BATCH + seat] = chosen[i];
  }
  c.arrive_done(task.done_counter);
}
