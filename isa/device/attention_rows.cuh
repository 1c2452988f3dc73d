// Attention's rows: which of the KV cache are a task's and how they are streamed, the queries, and the newest rows of K and V.
//
// KV rows are stored in blocks of 16: K as the fragments of a product with q, V as the fragments of a product with the probabilities
// (fp32: plain rows). isa.machine.kv_span says which rows are whose.
#pragma once
#include "isa/device/block.cuh"

constexpr int HD = HEAD_DIM_PADDED;
static_assert((CONSUMER_WARPS & (CONSUMER_WARPS - 1)) == 0, "blocks are dealt to the warps by the low bits of their number");
constexpr int KV_BLOCK_ROWS = 16;
constexpr int KV_HALF_BYTES = KV_BLOCK_ROWS * HD * ELEMENT_BYTES;  // K or V of one block
constexpr int KV_BLOCK_BYTES = 2 * KV_HALF_BYTES;
constexpr int KV_BLOCKS_PER_CHUNK = STAGE_BYTES / KV_BLOCK_BYTES;
constexpr int PARTIAL_HEAD = 2;  // maximum (base 2) and sum before a partial's values
constexpr int PARTIAL_ROW = HD + PARTIAL_HEAD;
constexpr bool TWO_PART = !WIDE && GROUP <= 4;  // q and the probabilities as a rounded part and its error, in columns h and h + 4
constexpr float LOG2E = 1.4426950408889634f;
constexpr float NEG_INF = -1e30f;  // finite, so that differences of masked maxima are 0, not NaN

struct KvSpan {
  int first, old, newest, units, active;
};
__device__ __forceinline__ KvSpan kv_span(const AttentionTask& t, int position) {
  KvSpan s;
  s.newest = position / KV_BLOCK_ROWS;
  s.old = max(0, s.newest - 1);
  s.first = t.window ? min(s.old, max(0, position - t.window + 1) / KV_BLOCK_ROWS) : 0;
  s.units = ((s.old - s.first) * KV_BLOCK_ROWS + t.unit_rows - 1) / t.unit_rows;
  s.active = max(1, min((int)t.splits, s.units));
  return s;
}

__device__ __forceinline__ uint8_t* kv_block(const Params& p, int layer, int head, int block) {
  const uint64_t index = ((uint64_t)layer * KV_HEADS + head) * KV_BLOCKS + block;
  return reinterpret_cast<uint8_t*>(p.kv) + index * KV_BLOCK_BYTES;
}

// Calls visit(first block, blocks) for every chunk the task streams, in order, until it returns false.
template <class Visit>
__device__ __forceinline__ bool for_each_kv_chunk(const AttentionTask& t, const KvSpan& s, Visit visit) {
  const int per_unit = t.unit_rows / KV_BLOCK_ROWS;
  for (int unit = t.split; unit < s.units; unit += t.splits) {
    const int start = s.first + unit * per_unit, stop = min(start + per_unit, s.old);
    for (int at = start; at < stop; at += KV_BLOCKS_PER_CHUNK)
      if (!visit(at, min(KV_BLOCKS_PER_CHUNK, stop - at))) return false;
  }
  return true;
}

__device__ __forceinline__ bool stream_attention(Feeder& f, const AttentionTask& task, const uint8_t*&, const Token& token) {
  const KvSpan span = kv_span(task, (int)token.position);
  if ((int)task.split >= span.active) return true;
  return for_each_kv_chunk(task, span, [&](int block, int blocks) {
    return f.stream(kv_block(f.b.p, task.layer, task.kv_head, block), blocks * KV_BLOCK_BYTES);
  });
}

// Scratch of one attention task.
struct AttentionScratch {
  float* base;
  // Row of q in scratch: heads, and where columns are free the rounding errors of the heads.
  __device__ uint8_t* q(int row) const { return reinterpret_cast<uint8_t*>(base) + row * HD * ELEMENT_BYTES; }
  __device__ float* new_k() const { return base + GROUP * HD; }
  __device__ float* new_v() const { return base + (GROUP + 1) * HD; }
  __device__ float* partial(int part, int head) const { return base + (GROUP + 2) * HD + (part * GROUP + head) * PARTIAL_ROW; }
};

// Elements d and d + 1 of a query as the products see them.
__device__ __forceinline__ float2 query_pair(const AttentionScratch& s, int head, int d) {
  if constexpr (WIDE) return *reinterpret_cast<const float2*>(s.q(head) + d * ELEMENT_BYTES);
  else {
    const uint32_t v = *reinterpret_cast<const uint32_t*>(s.q(head) + d * ELEMENT_BYTES);
    float2 q = make_float2(unpack_low(v), unpack_high(v));
    if constexpr (TWO_PART) {
      const uint32_t error = *reinterpret_cast<const uint32_t*>(s.q(GROUP + head) + d * ELEMENT_BYTES);
      q.x += unpack_low(error);
      q.y += unpack_high(error);
    }
    return q;
  }
}

// One head row of q, k or v: lane l holds dims l + 32 i and the partners half a head above.
struct HeadRow {
  static constexpr int HALF = HEAD_DIM / 2;
  static constexpr int PAIRS = ceil_div(HALF, 32);
  float low[PAIRS], high[PAIRS];

  __device__ __forceinline__ void read(Consumer& c, const uint64_t* from, Expected want) {
    uint2 v[2 * PAIRS];  // low dims, then high; a lane without dims reads the last ones
    c.read_all(v, want, [&](int i) { return from + (i < PAIRS ? 0 : HALF) + min_of(c.lane + 32 * (i % PAIRS), HALF - 1); });
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const bool has = HALF % 32 == 0 || c.lane + 32 * i < HALF;
      low[i] = has ? as_float(v[i].x) : 0.f;
      high[i] = has ? as_float(v[PAIRS + i].x) : 0.f;
    }
    __syncwarp();
  }
  __device__ __forceinline__ void normalise(const float* gain, int lane) {
    float ss = 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) ss += low[i] * low[i] + high[i] * high[i];
    const float scale = rsqrtf(warp_sum(ss) / (float)HEAD_DIM + RMS_EPS);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const int d = lane + 32 * i;
      if (d < HALF) { low[i] *= scale * __ldg(gain + d); high[i] *= scale * __ldg(gain + HALF + d); }
    }
  }
  __device__ __forceinline__ void rotate(const float2 (&angle)[PAIRS]) {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const float l = low[i], h = high[i];
      low[i] = l * angle[i].x - h * angle[i].y;
      high[i] = h * angle[i].x + l * angle[i].y;
    }
  }
  // put(dim, value) for every dim of the head that this lane holds.
  template <class Put>
  __device__ __forceinline__ void each(int lane, Put put) const {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const int d = lane + 32 * i;
      if (d < HALF) { put(d, low[i]); put(HALF + d, high[i]); }
    }
  }
};

__device__ __forceinline__ void store_element(uint8_t* to, int index, float v) {
  if constexpr (WIDE) reinterpret_cast<float*>(to)[index] = v;
  else reinterpret_cast<uint16_t*>(to)[index] = (uint16_t)pack2(v, 0.f);
}

// Where element (row, dim) of K and of V lies in a block's half, in elements.
__device__ __forceinline__ int k_index(int row, int dim) {
  if constexpr (WIDE) return row * HD + dim;
  const int lane = (row & 7) * 4 + ((dim & 15) >> 2);
  return (dim >> 4) * 256 + lane * 8 + ((dim & 2) << 1) + (row >> 3) * 2 + (dim & 1);
}
__device__ __forceinline__ int v_index(int row, int dim) {
  if constexpr (WIDE) return row * HD + dim;
  const int lane = (dim & 7) * 4 + ((row & 7) >> 1);
  return (dim >> 4) * 256 + lane * 8 + (row >> 3) * 4 + ((dim & 15) >> 3) * 2 + (row & 1);
}

// q heads, and on the tail the new k and v rows: one warp a row.
__device__ __forceinline__ void prepare_rows(Consumer& c, const AttentionTask& task, const Token& token, AttentionScratch s) {
  const Block& b = c.b;
  float2 angle[HeadRow::PAIRS];
  const float2* table = reinterpret_cast<const float2*>(b.p.rope) + (uint64_t)token.position * HeadRow::HALF;
#pragma unroll
  for (int i = 0; i < HeadRow::PAIRS; ++i)
    angle[i] = c.lane + 32 * i < HeadRow::HALF ? __ldg(table + c.lane + 32 * i) : make_float2(0.f, 0.f);
  const int rows = task.nq + (task.split == 0 ? 2 : 0);
  c.wait_released();
#pragma unroll 1
  for (int r = c.warp; r < rows; r += CONSUMER_WARPS) {
    HeadRow row;
    if (r < task.nq) {
      row.read(c, b.buffer(task.q_buf) + (task.q0 + r) * HEAD_DIM, token.expect(task.q_tag));
      if constexpr (QK_NORM) row.normalise(b.constant(task.q_gain), c.lane);
      row.rotate(angle);
      const float scale = LOG2E * rsqrtf((float)HEAD_DIM);
      row.each(c.lane, [&](int d, float v) {
        store_element(s.q(r), d, v * scale);
        if constexpr (TWO_PART) store_element(s.q(GROUP + r), d, v * scale - round_element(v * scale));
      });
      for (int d = HEAD_DIM + c.lane; d < HD; d += 32) {
        store_element(s.q(r), d, 0.f);
        if constexpr (TWO_PART) store_element(s.q(GROUP + r), d, 0.f);
      }
    } else {
      const bool is_k = r == task.nq;
      if (is_k) row.read(c, b.buffer(task.k_buf) + task.k_start, token.expect(task.k_tag));
      else row.read(c, b.buffer(task.v_buf) + task.v_start, token.expect(task.v_tag));
      if (is_k) {
        if constexpr (QK_NORM) row.normalise(b.constant(task.k_gain), c.lane);
        row.rotate(angle);
      }
      uint8_t* block = kv_block(b.p, task.layer, task.kv_head, token.position / KV_BLOCK_ROWS) + (is_k ? 0 : KV_HALF_BYTES);
      float* kept = is_k ? s.new_k() : s.new_v();
      const int at = token.position % KV_BLOCK_ROWS;
      row.each(c.lane, [&](int d, float v) {
        kept[d] = round_element(v);
        store_element(block, is_k ? k_index(at, d) : v_index(at, d), v);
      });
      for (int d = HEAD_DIM + c.lane; d < HD; d += 32) kept[d] = 0.f;
    }
  }
}
