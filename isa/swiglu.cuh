// swiglu: silu(gate) * up, element by element, published narrow once every element has been read.
#pragma once
#include "isa/gemv_glu.cuh"

__device__ __forceinline__ void consume_swiglu(Consumer& c, const SwiGluTask& task, const Token& token) {
  const Block& b = c.b;
  const uint64_t* gate = b.buffer(task.gate_buf) + task.col0;
  const uint64_t* up = b.buffer(task.up_buf) + task.col0;
  uint64_t* out = b.buffer(task.out_buf) + task.col0 / NARROW;
  const Expected gate_want = token.expect(task.gate_tag), up_want = token.expect(task.up_tag);
  const uint32_t tag = token.tag(task.out_tag);
  const int thread = c.warp * 32 + c.lane;
  float* kept = b.scratch();
  c.meet();  // scratch is all consumers': none may still be at an earlier task
  c.wait_released();
  for (int i = thread; i < task.count; i += CONSUMER_THREADS)
    kept[i] = silu(as_float(c.read(gate + i, gate_want).x)) * as_float(c.read(up + i, up_want).x);
  c.meet();  // every read of the task comes before its first publish
  for (int i = thread; i < task.count / NARROW; i += CONSUMER_THREADS) {
    if constexpr (WIDE) publish(out + i, as_bits(kept[i]), tag);
    else publish(out + i, pack2(kept[2 * i], kept[2 * i + 1]), tag);
  }
  c.arrive_done(task.done_counter);
  c.meet();  // scratch may be reused
}
