// seat_qkv: a seat's q, k and v, shares added; one warp a head: head norm, RoPE; k and v go to the stretch's KV blocks and to the cache's.
#pragma once
#include "isa/attention.cuh"
#include "isa/device/stretch.cuh"

constexpr int KV_ROWS = KV_BLOCKS * KV_BLOCK_ROWS;  // of the cache, and of the table of rotations

// The stretch's KV blocks have the cache's form: rows 16 i to 16 i + 15 of the stretch of a KV head.
__device__ __forceinline__ uint8_t* stretch_block(uint8_t* kv, int head, int i) { return kv + ((uint64_t)head * (BATCH / KV_BLOCK_ROWS) + i) * KV_BLOCK_BYTES; }

constexpr int QKV_ROWS = (HEADS + 2 * KV_HEADS) * HEAD_DIM;

// All rows of a seat in scratch: shares added in order, then the bias.
__device__ __forceinline__ void sum_rows(const Consumer& c, const SeatQkvTask& task) {
  constexpr int QUADS = QKV_ROWS / 4;
  static_assert(QKV_ROWS % 4 == 0, "rows are added four at a time");
  const float* sums = reinterpret_cast<const float*>(value(c.b, task.sums_buf));
#pragma unroll 2
  for (int quad = c.warp * 32 + c.lane; quad < QUADS; quad += CONSUMER_THREADS) {
    float4 total = added_shares(sums, task.shares, QKV_ROWS, task.seat, quad * 4);
    if (task.bias >= 0) add_to(total, __ldg(reinterpret_cast<const float4*>(c.b.constant(task.bias + quad * 4))));
    reinterpret_cast<float4*>(c.b.scratch())[quad] = total;
  }
}
__device__ __forceinline__ HeadRow summed_head(const Consumer& c, int head) {
  const float* from = c.b.scratch() + head * HEAD_DIM;
  HeadRow row;
#pragma unroll
  for (int i = 0; i < HeadRow::PAIRS; ++i) {
    const int d = c.lane + 32 * i;
    const bool has = HeadRow::HALF % 32 == 0 || d < HeadRow::HALF;
    row.low[i] = has ? from[d] : 0.f;
    row.high[i] = has ? from[HeadRow::HALF + d] : 0.f;
  }
  return row;
}

__device__ __forceinline__ void consume_seat_qkv(Consumer& c, const SeatQkvTask& task, const Token& token) {
  const Block& b = c.b;
  const int place = (int)token.position + task.seat, row = place % KV_BLOCK_ROWS, stretch_row = task.seat % KV_BLOCK_ROWS;
  const bool appends = task.seat < (int)b.p.active, attends = task.q_buf != NONE;
  float2 angle[HeadRow::PAIRS];  // seats past the end of the cache hold no token and take its last row's
  const float2* table = reinterpret_cast<const float2*>(b.p.rope) + (uint64_t)min_of(place, KV_ROWS - 1) * HeadRow::HALF;
#pragma unroll
  for (int i = 0; i < HeadRow::PAIRS; ++i)
    angle[i] = c.lane + 32 * i < HeadRow::HALF ? __ldg(table + c.lane + 32 * i) : make_float2(0.f, 0.f);
  c.wait_released();
  sum_rows(c, task);
  c.meet();
#pragma unroll 1
  for (int head = (attends ? 0 : HEADS) + c.warp; head < HEADS + 2 * KV_HEADS; head += CONSUMER_WARPS) {
    HeadRow values = summed_head(c, head);
    if (head < HEADS + KV_HEADS) {
      if constexpr (QK_NORM) values.normalise(b.constant(head < HEADS ? task.q_gain : task.k_gain), c.lane);
      values.rotate(angle);
    }
    if (head < HEADS) {
      uint8_t* q = value(b, task.q_buf) + ((uint64_t)task.seat * HEADS + head) * HEAD_DIM * ELEMENT_BYTES;
      const float scale = LOG2E * rsqrtf((float)HEAD_DIM);
      values.each(c.lane, [&](int d, float v) { store_element(q, d, v * scale); });
      continue;
    }
    const bool is_k = head < HEADS + KV_HEADS;
    const int kv_head = is_k ? head - HEADS : head - HEADS - KV_HEADS;
    auto put = [&](uint8_t* block, int at) {
      if (is_k) {
        values.each(c.lane, [&](int d, float v) { store_element(block, k_index(at, d), v); });
        for (int d = HEAD_DIM + c.lane; d < HD; d += 32) store_element(block, k_index(at, d), 0.f);
      } else {
        values.each(c.lane, [&](int d, float v) { store_element(block + KV_HALF_BYTES, v_index(at, d), v); });
        for (int d = HEAD_DIM + c.lane; d < HD; d += 32) store_element(block + KV_HALF_BYTES, v_index(at, d), 0.f);
      }
    };
    if (attends) put(stretch_block(value(b, task.kv_buf), kv_head, task.seat / KV_BLOCK_ROWS), stretch_row);
    if (appends) put(kv_block(b.p, task.layer, kv_head, place / KV_BLOCK_ROWS), row);
  }
  release_done(c, task.done_counter);
}
