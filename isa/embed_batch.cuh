// embed_batch: columns of the embedding rows of every seat's input token become the residual stream, narrow and interleaved.
#pragma once
#include "isa/device/batch.cuh"

__device__ __forceinline__ void consume_embed_batch(Consumer& c, const EmbedBatchTask& task, const Token& token) {
  const Block& b = c.b;
  const int g = c.lane >> 2, t = c.lane & 3;
  const bool forced = token.step < b.p.forced;
  const int32_t* hosts = reinterpret_cast<const int32_t*>(b.p.tokens_in) + (uint64_t)token.step * BATCH;
  uint32_t rows[SEAT_BLOCKS];
  c.wait_released();
#pragma unroll
  for (int block = 0; block < SEAT_BLOCKS; ++block) {
    const int seat = block * 8 + g;
    const int32_t host = forced ? __ldg(hosts + seat) : -1;  // below 0: this seat goes on by its own choice
    const uint32_t sampled = c.read(b.buffer(task.token_buf) + seat, token.expect_carried(task.token_tag)).x;
    rows[block] = host >= 0 ? (uint32_t)host : sampled;
  }
  c.meet();  // every read of the task comes before its first publish
  uint64_t* out = b.buffer(task.out_buf);
  const uint32_t tag = token.tag(task.out_tag);
  for (int run = task.col0 / 16 + c.warp; run < (task.col0 + task.cols) / 16; run += CONSUMER_WARPS)
#pragma unroll
    for (int block = 0; block < SEAT_BLOCKS; ++block) {
      const uint16_t* row = reinterpret_cast<const uint16_t*>(b.p.embedding) + (uint64_t)rows[block] * HIDDEN;
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(row + run * 16 + t * 4));
      publish_pair(out + narrow_packet(2 * run + (t >> 1), block, g, t & 1), v.x, v.y, tag);
    }
  c.arrive_done(task.done_counter);
}
