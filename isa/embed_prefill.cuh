// embed_prefill: columns of the embedding rows of a stretch's tokens become the residual stream, interleaved.
#pragma once
#include "isa/device/batch.cuh"

__device__ __forceinline__ void consume_embed_prefill(Consumer& c, const EmbedPrefillTask& task, const Token& token) {
  const Block& b = c.b;
  const int g = c.lane >> 2, t = c.lane & 3;
  const int32_t* tokens = reinterpret_cast<const int32_t*>(b.p.tokens_in);
  c.wait_released();
  uint64_t* out = b.buffer(task.out_buf);
  const uint32_t tag = token.tag(task.out_tag);
  for (int run = task.col0 / 16 + c.warp; run < (task.col0 + task.cols) / 16; run += CONSUMER_WARPS)
#pragma unroll 1
    for (int block = 0; block < SEAT_BLOCKS; ++block) {
      const uint16_t* row = reinterpret_cast<const uint16_t*>(b.p.embedding) + (uint64_t)(uint32_t)__ldg(tokens + block * 8 + g) * HIDDEN;
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(row + run * 16 + t * 4));
      uint64_t* to = out + wide_packet(run, block, 0, c.lane);
      publish(to, as_bits(unpack_low(v.x)), tag);
      publish(to + 1, as_bits(unpack_high(v.x)), tag);
      publish(to + 64, as_bits(unpack_low(v.y)), tag);
      publish(to + 65, as_bits(unpack_high(v.y)), tag);
    }
  c.arrive_done(task.done_counter);
}
