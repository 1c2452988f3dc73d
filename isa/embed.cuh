// embed: columns of the input token's embedding row become the residual stream.
#pragma once
#include "isa/device/block.cuh"

__device__ __forceinline__ float embedding_element(const Params& p, uint64_t index) {
  if constexpr (WIDE) return __ldg(reinterpret_cast<const float*>(p.embedding) + index);
  return unpack_low(__ldg(reinterpret_cast<const uint16_t*>(p.embedding) + index));
}

__device__ __forceinline__ void consume_embed(Consumer& c, const EmbedTask& task, const Token& token) {
  const Block& b = c.b;
  const bool forced = token.step < b.p.forced;
  const int32_t host = forced ? __ldg(reinterpret_cast<const int32_t*>(b.p.tokens_in) + token.step) : 0;
  c.wait_released();
  const uint32_t sampled = c.read(b.buffer(task.token_buf), token.expect_carried(task.token_tag)).x;
  c.meet();  // every read of the task comes before its first publish
  const uint64_t row = (uint64_t)(forced ? (uint32_t)host : sampled) * HIDDEN;
  uint64_t* out = b.buffer(task.out_buf);
  for (int i = task.col0 + c.warp * 32 + c.lane; i < task.col0 + task.cols; i += CONSUMER_THREADS)
    publish(out + i, as_bits(embedding_element(b.p, row + i)), token.tag(task.out_tag));
  c.arrive_done(task.done_counter);
}
