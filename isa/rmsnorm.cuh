// rmsnorm: every consumer reads a share of x for the sum of squares and keeps the task's columns; they are published once all is read.
#pragma once
#include "isa/device/block.cuh"

__device__ __forceinline__ void consume_rmsnorm(Consumer& c, const RmsNormTask& task, const Token& token) {
  const Block& b = c.b;
  const int thread = c.warp * 32 + c.lane;
  const uint64_t* x = b.buffer(task.x_buf);
  const Expected want = token.expect(task.x_tag);
  float* sums = b.scratch();
  float* kept = sums + CONSUMER_WARPS;
  c.meet();  // scratch is all consumers': none may still be at an earlier task
  c.wait_released();
  float squares = 0.f;
  for (int i = thread; i < task.cols; i += CONSUMER_THREADS) {
    const float v = as_float(c.read(x + i, want).x);
    squares = fmaf(v, v, squares);
    if (i >= task.col0 && i < task.col0 + task.count) kept[i - task.col0] = v;
  }
  __syncwarp();
  squares = warp_sum(squares);
  if (c.lane == 0) sums[c.warp] = squares;
  c.meet();  // every read of the task comes before its first publish
  float total = 0.f;
  for (int w = 0; w < CONSUMER_WARPS; ++w) total += sums[w];
  const float scale = rsqrtf(total / (float)task.cols + RMS_EPS);
  const float* gain = b.constant(task.gain + task.col0);
  uint64_t* out = b.buffer(task.out_buf) + task.col0 / NARROW;
  const uint32_t tag = token.tag(task.out_tag);
  for (int i = thread; i < task.count / NARROW; i += CONSUMER_THREADS) {
    if constexpr (WIDE) publish(out + i, as_bits(kept[i] * scale * __ldg(gain + i)), tag);
    else publish(out + i, pack2(kept[2 * i] * scale * __ldg(gain + 2 * i), kept[2 * i + 1] * scale * __ldg(gain + 2 * i + 1)), tag);
  }
  c.arrive_done(task.done_counter);
  c.meet();  // scratch may be reused
}
