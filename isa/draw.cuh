// draw: one warp picks the best candidate, hands it to the host, and to the next step unless it is a stop token.
#pragma once
#include "isa/device/sampling.cuh"
#include "isa/sample.cuh"

__device__ __forceinline__ void consume_draw(Consumer& c, const DrawTask& task, const Token& token) {
  const Block& b = c.b;
  c.wait_released();
  if (c.warp == 0) {
    const int32_t stop = stop_token(b.p, c.lane);
    const int row = best_candidate(c, b.buffer(task.in_buf), token.expect(task.in_tag), task.count);
    choose_token(c, row, stop, b.buffer(task.out_buf), token.tag(task.out_tag), token);
  }
  c.arrive_done(task.done_counter);
}
