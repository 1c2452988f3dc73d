// swiglu: silu(gate) * up, element by element, published narrow. Tags are checked in a first pass, values used in a second.
#pragma once
#include "isa/gemv_glu.cuh"

__device__ __forceinline__ void consume_swiglu(Consumer& c, const SwiGluTask& task, const Token& token) {
  const Block& b = c.b;
  const uint64_t* gate = b.buffer(task.gate_buf);
  const uint64_t* up = b.buffer(task.up_buf);
  uint64_t* out = b.buffer(task.out_buf);
  const Expected gate_want = token.expect(task.gate_tag), up_want = token.expect(task.up_tag);
  const uint32_t tag = token.tag(task.out_tag);
  c.wait_released();
  for (int i = task.col0 + c.warp * 32 + c.lane; i < task.col0 + task.count; i += CONSUMER_THREADS) {
    c.read(gate + i, gate_want);
    c.read(up + i, up_want);
  }
  c.meet();  // every read of the task comes before its first publish
  for (int i = task.col0 + (c.warp * 32 + c.lane) * NARROW; i < task.col0 + task.count; i += CONSUMER_THREADS * NARROW) {
    const float low = silu(as_float(load_packet(gate + i).x)) * as_float(load_packet(up + i).x);
    if constexpr (WIDE) {
      publish(out + i, as_bits(low), tag);
    } else {
      const float high = silu(as_float(load_packet(gate + i + 1).x)) * as_float(load_packet(up + i + 1).x);
      publish(out + i / 2, pack2(low, high), tag);
    }
  }
  c.arrive_done(task.done_counter);
}
