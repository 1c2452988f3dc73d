// rmsnorm: every consumer reads all of x for the sum of squares, then publishes its share of the task's columns.
#pragma once
#include "isa/device/block.cuh"

__device__ __forceinline__ void consume_rmsnorm(Consumer& c, const RmsNormTask& task, const Token& token) {
  const Block& b = c.b;
  const int thread = c.warp * 32 + c.lane;
  const uint64_t* x = b.buffer(task.x_buf);
  const Expected want = token.expect(task.x_tag);
  c.wait_released();
  float squares = 0.f;
  for (int i = thread; i < task.cols; i += CONSUMER_THREADS) {
    const float v = as_float(c.read(x + i, want).x);
    squares = fmaf(v, v, squares);
  }
  __syncwarp();
  squares = warp_sum(squares);
  float* sums = b.scratch();
  if (c.lane == 0) sums[c.warp] = squares;
  c.meet();
  float total = 0.f;
  for (int w = 0; w < CONSUMER_WARPS; ++w) total += sums[w];
  const float scale = rsqrtf(total / (float)task.cols + RMS_EPS);
  const float* gain = b.constant(task.gain);
  uint64_t* out = b.buffer(task.out_buf);
  const uint32_t tag = token.tag(task.out_tag);
  for (int i = task.col0 + thread * NARROW; i < task.col0 + task.count; i += CONSUMER_THREADS * NARROW) {
    const float low = as_float(load_packet(x + i).x) * scale * __ldg(gain + i);
    if constexpr (WIDE) {
      publish(out + i, as_bits(low), tag);
    } else {
      const float high = as_float(load_packet(x + i + 1).x) * scale * __ldg(gain + i + 1);
      publish(out + i / 2, pack2(low, high), tag);
    }
  }
  c.meet();  // scratch may be reused
  c.arrive_done(task.done_counter);
}
