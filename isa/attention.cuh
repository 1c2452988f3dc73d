// attention: one KV head's query group over its share of the KV cache. See isa/attention.py for the meaning.
//
// A warp takes whole blocks of 16 KV rows; its running maximum, sum and output stay in registers and meet the other warps' in scratch at the
// end. Rows, arithmetic and end have a file each.
#pragma once
#include "isa/device/attention_merge.cuh"

// The tail's blocks come from global memory, where the weight stream has driven them out of L2: asked for before the wait, so that they
// are in L1 when they are needed. Only this SM ever writes them.
__device__ __forceinline__ void touch_newest_blocks(const Consumer& c, const AttentionTask& task, const KvSpan& span, int position) {
  constexpr int SECTOR = 32;
  const uint8_t* from = kv_block(c.b.p, task.layer, task.kv_head, span.old);
  const int bytes = (span.newest - span.old + (position % KV_BLOCK_ROWS != 0)) * KV_BLOCK_BYTES;
  for (int at = (c.warp * 32 + c.lane) * SECTOR; at < bytes; at += CONSUMER_THREADS * SECTOR) touch(from + at);
}

// Blocks of a task, streamed ones first, then the tail's two, are dealt to the warps in turn.
__device__ __forceinline__ void consume_attention(Consumer& c, const AttentionTask& task, const Token& token) {
  const Block& b = c.b;
  const int position = (int)token.position;
  const KvSpan span = kv_span(task, position);
  if ((int)task.split >= span.active) {
    c.arrive_done(task.done_counter);
    return;
  }
  const int nq = opaque(task.nq);  // read before the wait
  const bool tail = task.split == 0;
  const int window_start = task.window ? max(0, position - task.window + 1) : 0;
  const AttentionScratch s{b.scratch()};
  if (tail) touch_newest_blocks(c, task, span, position);
  c.meet();  // scratch is all consumers': none may still be at an earlier task
  prepare_rows(c, task, token, s);
  c.meet();

  int seen = 0;  // blocks of the task so far
#if ELEMENT == 2
  BlockSoftmaxWide softmax;
  softmax.begin();
  auto add = [&](const uint8_t* block, int index, int to) {
    const int from = max(0, window_start - index * KV_BLOCK_ROWS);
    const float* k = reinterpret_cast<const float*>(block);
    softmax.add(s, k, k + KV_BLOCK_ROWS * HD, from, to, nq, c.lane);
  };
#else
  BlockSoftmax softmax;
  softmax.begin(s, nq, c.lane);
  auto add = [&](const uint8_t* block, int index, int to) {
    softmax.add(block, max(0, window_start - index * KV_BLOCK_ROWS), to, c.lane);
  };
#endif
  for_each_kv_chunk(task, span, [&](int block, int blocks) {
    const uint8_t* chunk = c.wait_chunk();
#pragma unroll 1
    for (int i = (c.warp - seen) & (CONSUMER_WARPS - 1); i < blocks; i += CONSUMER_WARPS)
      add(chunk + i * KV_BLOCK_BYTES, block + i, KV_BLOCK_ROWS);
    seen += blocks;
    c.release_chunk(softmax.sums());
    return true;
  });
  if (tail) {
    const int blocks = span.newest - span.old + 1;
#pragma unroll 1
    for (int i = (c.warp - seen) & (CONSUMER_WARPS - 1); i < blocks; i += CONSUMER_WARPS) {
      const int block = span.old + i;
      add(kv_block(b.p, task.layer, task.kv_head, block), block, min(KV_BLOCK_ROWS, position - block * KV_BLOCK_ROWS));
    }
    seen += blocks;
    if (seen % CONSUMER_WARPS == c.warp) attend_new_row(s, nq, c.lane);
  }
  softmax.finish(s, c.warp, nq, c.lane);
  c.meet();

  const int size = nq * (HEAD_DIM + PARTIAL_HEAD);
  uint64_t* partials = nullptr;  // a task that is never split has no buffer for them
  if (task.splits > 1) partials = b.buffer(task.part_buf) + task.q0 * (task.splits - 1) * (HEAD_DIM + PARTIAL_HEAD);
  if (tail) publish_output(c, task, s, partials, span.active - 1, token);
  else publish_partial(c, task, s, partials + (task.split - 1) * size, token.tag(task.part_tag));
  c.arrive_done(task.done_counter);
  c.meet();  // scratch may be reused
}
