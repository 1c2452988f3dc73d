// attention_prefill: one query head of 8 seats of a stretch over the KV rows before the stretch and those in it.
//
// The 8 columns of a product are the seats, so each has a mask of its own. Rows before the stretch lie in the cache, in the blocks that
// isa/attention.cuh describes; those of the stretch become such blocks in scratch. Warps take whole blocks in turn.
#pragma once
#include "isa/attention.cuh"
#include "isa/device/batch.cuh"

constexpr int STRETCH_SEATS = 8;
constexpr int KV_ROWS = KV_BLOCKS * KV_BLOCK_ROWS;  // of the cache, and of the table of rotations
constexpr int HEADS_A_KV_HEAD = HEADS / KV_HEADS;

struct StretchScratch {
  uint8_t* base;
  __device__ uint8_t* q(int seat) const { return base + seat * HD * ELEMENT_BYTES; }
  // Rows 16 i to 16 i + 15 of the stretch.
  __device__ uint8_t* block(int i) const { return base + STRETCH_SEATS * HD * ELEMENT_BYTES + i * KV_BLOCK_BYTES; }
  __device__ float* partial(int warp, int seat) const {
    return reinterpret_cast<float*>(block(ceil_div(BATCH, KV_BLOCK_ROWS))) + (warp * STRETCH_SEATS + seat) * PARTIAL_ROW;
  }
};

// Reads `count` head rows, row i from packet `at(i)` on, dealt to the warps in turn, and calls put(i, row) for each. A warp asks for several
// before it looks at the first.
template <class At, class Put>
__device__ __forceinline__ void for_each_row(Consumer& c, int count, Expected want, At at, Put put) {
  constexpr int PAIRS = HeadRow::PAIRS, HALF = HeadRow::HALF, AT_ONCE = max_of(1, 4 / PAIRS);
#pragma unroll 1
  for (int first = c.warp; first < count; first += CONSUMER_WARPS * AT_ONCE) {
    uint2 v[AT_ONCE * 2 * PAIRS];  // of each row its low dims, then the high ones; what is beyond the last row reads that one again
    c.read_all(v, want, [&](int i) {
      const int row = min_of(first + i / (2 * PAIRS) * CONSUMER_WARPS, count - 1), part = i % (2 * PAIRS);
      return at(row) + (part < PAIRS ? 0 : HALF) + min_of(c.lane + 32 * (part % PAIRS), HALF - 1);
    });
    __syncwarp();
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int row = first + j * CONSUMER_WARPS;
      if (row >= count) break;
      HeadRow head;
#pragma unroll
      for (int i = 0; i < PAIRS; ++i) {
        const bool has = HALF % 32 == 0 || c.lane + 32 * i < HALF;
        head.low[i] = has ? as_float(v[j * 2 * PAIRS + i].x) : 0.f;
        head.high[i] = has ? as_float(v[j * 2 * PAIRS + PAIRS + i].x) : 0.f;
      }
      put(row, head);
    }
  }
}

// Rotates a head row to its position; seats past the end of the cache hold no token and take the last one.
__device__ __forceinline__ void rotate_to(HeadRow& head, const Params& p, int position, int lane) {
  float2 angle[HeadRow::PAIRS];
  const float2* table = reinterpret_cast<const float2*>(p.rope) + (uint64_t)min_of(position, KV_ROWS - 1) * HeadRow::HALF;
#pragma unroll
  for (int i = 0; i < HeadRow::PAIRS; ++i)
    angle[i] = lane + 32 * i < HeadRow::HALF ? __ldg(table + lane + 32 * i) : make_float2(0.f, 0.f);
  head.rotate(angle);
}

// q of the task's seats, and k and v of the stretch up to the last of them, in scratch; k and v of the task's own seats also in the cache, where
// the task is the one that appends them.
__device__ __forceinline__ void prepare_stretch(Consumer& c, const AttentionPrefillTask& task, const Token& token, StretchScratch s) {
  const Block& b = c.b;
  const int start = (int)token.position, seat0 = task.seat0, kv_head = task.head / HEADS_A_KV_HEAD;
  const bool appends = task.head % HEADS_A_KV_HEAD == 0;
  const uint64_t* q = b.buffer(task.q_buf) + seat0 * task.q_stride + task.head * HEAD_DIM;
  for_each_row(c, STRETCH_SEATS, token.expect(task.q_tag), [&](int seat) { return q + seat * task.q_stride; }, [&](int seat, HeadRow& head) {
    if constexpr (QK_NORM) head.normalise(b.constant(task.q_gain), c.lane);
    rotate_to(head, b.p, start + seat0 + seat, c.lane);
    const float scale = LOG2E * rsqrtf((float)HEAD_DIM);
    head.each(c.lane, [&](int d, float v) { store_element(s.q(seat), d, v * scale); });
    for (int d = HEAD_DIM + c.lane; d < HD; d += 32) store_element(s.q(seat), d, 0.f);
  });
  auto cached = [&](int seat) { return kv_block(b.p, task.layer, kv_head, (start + seat) / KV_BLOCK_ROWS); };
  auto is_appended = [&](int seat) { return appends && seat >= seat0 && seat < (int)b.p.active; };
  const uint64_t* k = b.buffer(task.k_buf) + task.k_start;
  for_each_row(c, seat0 + STRETCH_SEATS, token.expect(task.k_tag), [&](int seat) { return k + seat * task.kv_stride; }, [&](int seat, HeadRow& head) {
    if constexpr (QK_NORM) head.normalise(b.constant(task.k_gain), c.lane);
    rotate_to(head, b.p, start + seat, c.lane);
    uint8_t* block = s.block(seat / KV_BLOCK_ROWS);
    const int at = seat % KV_BLOCK_ROWS;
    head.each(c.lane, [&](int d, float v) { store_element(block, k_index(at, d), v); });
    for (int d = HEAD_DIM + c.lane; d < HD; d += 32) store_element(block, k_index(at, d), 0.f);
    if (is_appended(seat)) {
      const int row = (start + seat) % KV_BLOCK_ROWS;
      head.each(c.lane, [&](int d, float v) { store_element(cached(seat), k_index(row, d), v); });
    }
  });
  const uint64_t* v = b.buffer(task.v_buf) + task.v_start;
  for_each_row(c, seat0 + STRETCH_SEATS, token.expect(task.v_tag), [&](int seat) { return v + seat * task.kv_stride; }, [&](int seat, HeadRow& head) {
    uint8_t* block = s.block(seat / KV_BLOCK_ROWS) + KV_HALF_BYTES;
    const int at = seat % KV_BLOCK_ROWS;
    head.each(c.lane, [&](int d, float x) { store_element(block, v_index(at, d), x); });
    for (int d = HEAD_DIM + c.lane; d < HD; d += 32) store_element(block, v_index(at, d), 0.f);
    if (is_appended(seat)) {
      const int row = (start + seat) % KV_BLOCK_ROWS;
      head.each(c.lane, [&](int d, float x) { store_element(cached(seat) + KV_HALF_BYTES, v_index(row, d), x); });
    }
  });
}

// Running softmax of one warp over blocks of 16 rows, seats in the 8 columns: a lane has columns 2t and 2t + 1.
struct StretchSoftmax {
  static constexpr int STEPS = HD / 16;
  static constexpr bool V_EARLY = STEPS <= 4;  // V is asked for before the scores where registers allow
  uint2 q[STEPS];
  float m[2], l[2], o[STEPS][4];

  __device__ __forceinline__ StretchSoftmax(const StretchScratch& s, int lane) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      q[i] = *reinterpret_cast<const uint2*>(s.q(lane >> 2) + (i * 16 + (lane & 3) * 4) * ELEMENT_BYTES);
#pragma unroll
      for (int j = 0; j < 4; ++j) o[i][j] = 0.f;
    }
    m[0] = m[1] = NEG_INF;
    l[0] = l[1] = 0.f;
  }
  // The first `count` rows of `block`, row r at position `first` + r, for the seats from position `seat` on.
  __device__ __forceinline__ void add(const uint8_t* block, int first, int count, int seat, int window, int lane) {
    const int g = lane >> 2, t = lane & 3;
    uint4 early[V_EARLY ? STEPS : 1];
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    if constexpr (V_EARLY) {
#pragma unroll
      for (int i = 0; i < STEPS; ++i) early[i] = fragment(block + KV_HALF_BYTES, i, lane);
    }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) multiply(d, fragment(block, i, lane), q[i].x, q[i].y);
    float p[4];
#pragma unroll
    for (int col = 0; col < 2; ++col) {
      const int low_age = seat + 2 * t + col - (first + g), high_age = low_age - 8;
      const bool low = g < count && low_age >= 0 && (window == 0 || low_age < window);
      const bool high = g + 8 < count && high_age >= 0 && (window == 0 || high_age < window);
      if (!low) d[col] = NEG_INF;
      if (!high) d[col + 2] = NEG_INF;
      float top = fmaxf(d[col], d[col + 2]);
#pragma unroll
      for (int x = 4; x < 32; x <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
      const float old = m[col];
      m[col] = fmaxf(old, top);
      const float scale = fast_exp2(old - m[col]);
      p[col] = low ? round_element(fast_exp2(d[col] - m[col])) : 0.f;
      p[col + 2] = high ? round_element(fast_exp2(d[col + 2] - m[col])) : 0.f;
      l[col] = l[col] * scale + p[col] + p[col + 2];
#pragma unroll
      for (int i = 0; i < STEPS; ++i) { o[i][col] *= scale; o[i][col + 2] *= scale; }
    }
    const uint32_t b0 = transposed(pack2(p[0], p[1])), b1 = transposed(pack2(p[2], p[3]));
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      uint4 v = V_EARLY ? early[V_EARLY ? i : 0] : fragment(block + KV_HALF_BYTES, i, lane);
      if (count < KV_BLOCK_ROWS) clear_rows(v, count, lane);
      multiply(o[i], v, b0, b1);
    }
  }
  __device__ __forceinline__ void finish(const StretchScratch& s, int warp, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int col = 0; col < 2; ++col) {
      float sum = l[col];
#pragma unroll
      for (int x = 4; x < 32; x <<= 1) sum += __shfl_xor_sync(~0u, sum, x);
      float* to = s.partial(warp, 2 * t + col);
      if (g == 0) { to[0] = m[col]; to[1] = sum; }
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        to[PARTIAL_HEAD + i * 16 + g] = o[i][col];
        to[PARTIAL_HEAD + i * 16 + g + 8] = o[i][col + 2];
      }
    }
  }

 private:
  static __device__ __forceinline__ uint32_t transposed(uint32_t v) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
  }
};

__device__ __forceinline__ void publish_seats(const Consumer& c, const AttentionPrefillTask& task, const StretchScratch& s, uint32_t tag) {
  uint64_t* out = c.b.buffer(task.out_buf);
  for (int i = c.warp * 32 + c.lane; i < STRETCH_SEATS * PER_HEAD; i += CONSUMER_THREADS) {
    const int seat = i / PER_HEAD, pair = i % PER_HEAD;
    Partial parts[CONSUMER_WARPS];
#pragma unroll
    for (int w = 0; w < CONSUMER_WARPS; ++w) {
      const float* from = s.partial(w, seat);
      parts[w].m = from[0];
      parts[w].l = from[1];
#pragma unroll
      for (int e = 0; e < NARROW; ++e) parts[w].o[e] = from[PARTIAL_HEAD + pair * NARROW + e];
    }
    const Partial all = merge(parts);
    const float inverse = 1.f / all.l;  // a seat sees at least its own row
    publish(out + ((task.seat0 + seat) * HEADS + task.head) * PER_HEAD + pair, pack2(all.o[0] * inverse, all.o[NARROW - 1] * inverse), tag);
  }
}

__device__ __forceinline__ void consume_attention_prefill(Consumer& c, const AttentionPrefillTask& task, const Token& token) {
  const StretchScratch s{reinterpret_cast<uint8_t*>(c.b.scratch())};
  const int start = (int)token.position, seat = start + task.seat0, rows = task.seat0 + STRETCH_SEATS;
  const int kv_head = task.head / HEADS_A_KV_HEAD;
  const int first = task.window ? min_of(start, max_of(0, seat - task.window + 1)) / KV_BLOCK_ROWS : 0;
  const int old_blocks = ceil_div(start, KV_BLOCK_ROWS) - first, blocks = old_blocks + ceil_div(rows, KV_BLOCK_ROWS);
  c.meet();  // scratch is all consumers': none may still be at an earlier task
  c.wait_released();
  prepare_stretch(c, task, token, s);
  c.meet();
  __syncwarp();
  StretchSoftmax softmax(s, c.lane);
#pragma unroll 1
  for (int i = c.warp; i < blocks; i += CONSUMER_WARPS) {
    const bool is_old = i < old_blocks;
    const int row = is_old ? (first + i) * KV_BLOCK_ROWS : (i - old_blocks) * KV_BLOCK_ROWS;  // of the sequence, or of the stretch
    const uint8_t* block = is_old ? kv_block(c.b.p, task.layer, kv_head, first + i) : s.block(i - old_blocks);
    softmax.add(block, is_old ? row : start + row, min_of(KV_BLOCK_ROWS, (is_old ? start : rows) - row), seat, task.window, c.lane);
  }
  softmax.finish(s, c.warp, c.lane);
  c.meet();
  publish_seats(c, task, s, token.tag(task.out_tag));
  c.arrive_done(task.done_counter);
  c.meet();  // scratch may be reused
}
