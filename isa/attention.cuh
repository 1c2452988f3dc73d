// attention: one KV head's query group over its share of the KV cache.
//
// KV rows are stored in blocks of 16: K as the fragments of a product with q, V as the fragments of a product with the probabilities
// (fp32: plain rows). A warp takes whole blocks; its running maximum, sum and output stay in registers and meet the other warps' in
// scratch at the end. See isa/attention.py for the meaning and isa.machine.kv_span for which rows are whose.
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

__device__ __forceinline__ uint4 fragment(const uint8_t* from, int index, int lane) {
  return *reinterpret_cast<const uint4*>(from + index * FRAGMENT_BYTES + lane * 16);
}
// V rows from `to` on hold whatever an earlier sequence left there: zeroed, so that 0 * NaN cannot arise.
__device__ __forceinline__ void clear_rows(uint4& v, int to, int lane) {
  const int row = (lane & 3) * 2;
  const uint32_t low = (row < to ? 0xFFFFu : 0u) | (row + 1 < to ? 0xFFFF0000u : 0u);
  const uint32_t high = (row + 8 < to ? 0xFFFFu : 0u) | (row + 9 < to ? 0xFFFF0000u : 0u);
  v.x &= low;
  v.y &= low;
  v.z &= high;
  v.w &= high;
}

// Running softmax of one warp over blocks of 16 rows, 16-bit elements: products on the tensor cores, heads in the 8 columns.
struct BlockSoftmax {
  static constexpr int STEPS = HD / 16;
  static constexpr bool V_EARLY = STEPS <= 4;  // V is asked for before the scores where registers allow
  uint2 q[STEPS];
  float m[2], l[2], o[STEPS][4];

  __device__ __forceinline__ void begin(const AttentionScratch& s, int nq, int lane) {
    const int column = lane >> 2, t = lane & 3, head = TWO_PART ? column & 3 : column;
    const int row = TWO_PART && column >= 4 ? GROUP + head : head;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      q[i] = head < nq ? *reinterpret_cast<const uint2*>(s.q(row) + (i * 16 + t * 4) * 2) : make_uint2(0, 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) o[i][j] = 0.f;
    }
    m[0] = m[1] = NEG_INF;
    l[0] = l[1] = 0.f;
  }
  // Rows of `block` (shared or global memory) in [from, to) count.
  __device__ __forceinline__ void add(const uint8_t* block, int from, int to, int lane) {
    const int g = lane >> 2;
    uint4 early[V_EARLY ? STEPS : 1];
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    if constexpr (V_EARLY) {
#pragma unroll
      for (int i = 0; i < STEPS; ++i) early[i] = fragment(block + KV_HALF_BYTES, i, lane);
    }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) multiply(d, fragment(block, i, lane), q[i].x, q[i].y);
    if constexpr (TWO_PART) {
#pragma unroll
      for (int j = 0; j < 4; ++j) d[j] += __shfl_xor_sync(~0u, d[j], 2);  // columns h and h + 4: both lanes have the whole score
    }
    const bool low = g >= from && g < to, high = g + 8 >= from && g + 8 < to;
    if (!low) d[0] = d[1] = NEG_INF;
    if (!high) d[2] = d[3] = NEG_INF;
    float p[4];
#pragma unroll
    for (int col = 0; col < 2; ++col) {
      float top = fmaxf(d[col], d[col + 2]);
#pragma unroll
      for (int x = 4; x < 32; x <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
      const float old = m[col];
      m[col] = fmaxf(old, top);
      const float scale = fast_exp2(old - m[col]);
      p[col] = low ? fast_exp2(d[col] - m[col]) : 0.f;
      p[col + 2] = high ? fast_exp2(d[col + 2] - m[col]) : 0.f;
      l[col] = l[col] * scale + weight(p[col]) + weight(p[col + 2]);
#pragma unroll
      for (int i = 0; i < STEPS; ++i) { o[i][col] *= scale; o[i][col + 2] *= scale; }
    }
    if constexpr (TWO_PART) {
      if (lane & 2) {
#pragma unroll
        for (int j = 0; j < 4; ++j) p[j] -= round_element(p[j]);
      }
    }
    const uint32_t b0 = transpose8(pack2(p[0], p[1])), b1 = transpose8(pack2(p[2], p[3]));
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      uint4 v = V_EARLY ? early[V_EARLY ? i : 0] : fragment(block + KV_HALF_BYTES, i, lane);
      if (to < KV_BLOCK_ROWS) clear_rows(v, to, lane);
      multiply(o[i], v, b0, b1);
    }
  }
  // A word that depends on every element of the blocks so far.
  __device__ __forceinline__ uint32_t sums() const {
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) all |= as_bits(o[i][0]);
    return all;
  }
  __device__ __forceinline__ void finish(const AttentionScratch& s, int part, int nq, int lane) {
    const int g = lane >> 2, t = lane & 3;
    if constexpr (TWO_PART) {
#pragma unroll
      for (int i = 0; i < STEPS; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) o[i][j] += __shfl_xor_sync(~0u, o[i][j], 2);
    }
#pragma unroll
    for (int col = 0; col < 2; ++col) {
      float sum = l[col];
#pragma unroll
      for (int x = 4; x < 32; x <<= 1) sum += __shfl_xor_sync(~0u, sum, x);
      const int head = 2 * t + col;
      if (head >= nq) continue;
      float* to = s.partial(part, head);
      if (g == 0) { to[0] = m[col]; to[1] = sum; }
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        to[PARTIAL_HEAD + i * 16 + g] = o[i][col];
        to[PARTIAL_HEAD + i * 16 + g + 8] = o[i][col + 2];
      }
    }
  }

 private:
  // What a probability weighs in the output product.
  static __device__ __forceinline__ float weight(float p) {
    if constexpr (TWO_PART) return round_element(p) + round_element(p - round_element(p));
    return round_element(p);
  }
  static __device__ __forceinline__ uint32_t transpose8(uint32_t v) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
  }
};

// The same with fp32 elements by FMA: scores with half a row a lane, output with lane l holding dims l + 32 i.
struct BlockSoftmaxWide {
  static constexpr int DIMS = ceil_div(HD, 32);
  float m[GROUP], l[GROUP], o[GROUP][DIMS];

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {
      m[h] = NEG_INF;
      l[h] = 0.f;
#pragma unroll
      for (int i = 0; i < DIMS; ++i) o[h][i] = 0.f;
    }
  }
  __device__ __forceinline__ void add(const AttentionScratch& s, const float* k, const float* v, int from, int to, int nq, int lane) {
    const int row = lane >> 1;
    const bool counts = row >= from && row < to;
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {
      if (h >= nq) continue;
      const float* q = reinterpret_cast<const float*>(s.q(h));
      float score = 0.f;
      for (int d = (lane & 1) * (HD / 2); d < (lane & 1) * (HD / 2) + HD / 2; ++d) score = fmaf(q[d], k[row * HD + d], score);
      score += __shfl_xor_sync(~0u, score, 1);
      if (!counts) score = NEG_INF;
      const float top = fmaxf(m[h], warp_max(score)), scale = fast_exp2(m[h] - top);
      const float p = counts ? fast_exp2(score - top) : 0.f;
      m[h] = top;
      l[h] = l[h] * scale + 0.5f * warp_sum(p);
#pragma unroll
      for (int i = 0; i < DIMS; ++i) o[h][i] *= scale;
      for (int r = from; r < to; ++r) {
        const float weight = __shfl_sync(~0u, p, 2 * r);
#pragma unroll
        for (int i = 0; i < DIMS; ++i)
          if (lane + 32 * i < HD) o[h][i] = fmaf(weight, v[r * HD + lane + 32 * i], o[h][i]);
      }
    }
  }
  // A word that depends on every element of the blocks so far.
  __device__ __forceinline__ uint32_t sums() const {
    uint32_t all = 0;
#pragma unroll
    for (int h = 0; h < GROUP; ++h)
#pragma unroll
      for (int i = 0; i < DIMS; ++i) all |= as_bits(o[h][i]);
    return all;
  }
  __device__ __forceinline__ void finish(const AttentionScratch& s, int part, int nq, int lane) {
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {
      if (h >= nq) continue;
      float* to = s.partial(part, h);
      if (lane == 0) { to[0] = m[h]; to[1] = l[h]; }
#pragma unroll
      for (int i = 0; i < DIMS; ++i)
        if (lane + 32 * i < HD) to[PARTIAL_HEAD + lane + 32 * i] = o[h][i];
    }
  }
};

// The new row alone: one score a head, eight lanes for each; its values are the output.
__device__ __forceinline__ void attend_new_row(const AttentionScratch& s, int nq, int lane) {
  constexpr int LANES = 8, AT_ONCE = 32 / LANES;
  const int part = lane % LANES;
#pragma unroll
  for (int base = 0; base < GROUP; base += AT_ONCE) {
    const int h = base + lane / LANES;
    float score = 0.f;
    if (h < nq)
      for (int d = 2 * part; d < HEAD_DIM; d += 2 * LANES) {
        const float2 k = *reinterpret_cast<const float2*>(s.new_k() + d);
        const float2 q = query_pair(s, h, d);
        score = fmaf(q.x, k.x, fmaf(q.y, k.y, score));
      }
#pragma unroll
    for (int x = 1; x < LANES; x <<= 1) score += __shfl_xor_sync(~0u, score, x);
    if (h >= nq) continue;
    float* to = s.partial(CONSUMER_WARPS, h);
    if (part == 0) { to[0] = score; to[1] = 1.f; }
    for (int d = 2 * part; d < HD; d += 2 * LANES) *reinterpret_cast<float2*>(to + PARTIAL_HEAD + d) = *reinterpret_cast<const float2*>(s.new_v() + d);
  }
}

// Softmax partials of one head and of NARROW dims: maximum (base 2), sum and values. Of several, all are read before any is weighed, so a
// merge costs one latency and not one for each.
struct Partial {
  float m = NEG_INF, l = 0.f, o[NARROW] = {};
  __device__ __forceinline__ void weigh(float top) {
    const float scale = fast_exp2(m - top);
    m = top;
    l *= scale;
#pragma unroll
    for (int e = 0; e < NARROW; ++e) o[e] *= scale;
  }
  __device__ __forceinline__ void add(const Partial& other) {  // of the same maximum
    l += other.l;
#pragma unroll
    for (int e = 0; e < NARROW; ++e) o[e] += other.o[e];
  }
};
template <int N>
__device__ __forceinline__ Partial merge(Partial (&parts)[N]) {
  float top = parts[0].m;
#pragma unroll
  for (int i = 1; i < N; ++i) top = fmaxf(top, parts[i].m);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    parts[i].weigh(top);
    if (i) parts[0].add(parts[i]);
  }
  return parts[0];
}

// The warps' partials of elements [d, d + NARROW) of a head, in warp order, and on the tail that of the new row. A warp without blocks has an
// empty one, so nothing here depends on how many have some.
template <bool TAIL>
__device__ __forceinline__ Partial merge_warps(const AttentionScratch& s, int head, int d) {
  constexpr int N = CONSUMER_WARPS + TAIL;
  Partial parts[N];
#pragma unroll
  for (int w = 0; w < N; ++w) {
    const float* from = s.partial(w, head);
    const float2 weight = *reinterpret_cast<const float2*>(from);
    parts[w].m = weight.x;
    parts[w].l = weight.y;
    if constexpr (NARROW == 2) {
      const float2 v = *reinterpret_cast<const float2*>(from + PARTIAL_HEAD + d);
      parts[w].o[0] = v.x;
      parts[w].o[NARROW - 1] = v.y;
    } else {
      parts[w].o[0] = from[PARTIAL_HEAD + d];
    }
  }
  return merge(parts);
}

// Threads that share the merge of one (head, dims): neighbours, each with its share of the splits.
constexpr int PER_HEAD = HEAD_DIM / NARROW;
constexpr int sharers(int free) { return free >= 8 ? 8 : free >= 4 ? 4 : free >= 2 ? 2 : 1; }
constexpr int SHARERS = sharers(CONSUMER_THREADS / (GROUP * PER_HEAD));
constexpr int SPLITS_AT_ONCE = 4;

// The other splits' partials that fall to this thread: splits `first`, first + SHARERS, ... of `count`, in that order.
__device__ __forceinline__ Partial merge_splits(Consumer& c, const uint64_t* part, int stride, int first, int count, int d, Expected want) {
  Partial total;
#pragma unroll 1
  for (int base = first; base < count; base += SHARERS * SPLITS_AT_ONCE) {
    // Maximum and sum, then the values; what is beyond the last split reads that one again.
    uint4 v[2 * SPLITS_AT_ONCE];
    c.read_all(v, want, [&](int i) {
      const uint64_t* from = part + min_of(base + i / 2 * SHARERS, count - 1) * stride;
      return i % 2 ? from + PARTIAL_HEAD + d / 2 * 2 : from;
    });
    Partial parts[SPLITS_AT_ONCE + 1];
#pragma unroll
    for (int i = 0; i < SPLITS_AT_ONCE; ++i) {
      if (base + i * SHARERS >= count) continue;
      parts[i].m = as_float(v[2 * i].x);
      parts[i].l = as_float(v[2 * i].z);
      parts[i].o[0] = as_float(NARROW == 1 && d % 2 ? v[2 * i + 1].z : v[2 * i + 1].x);
      if constexpr (NARROW == 2) parts[i].o[NARROW - 1] = as_float(v[2 * i + 1].z);
    }
    parts[SPLITS_AT_ONCE] = total;
    total = merge(parts);
  }
  return total;
}

// Neighbouring threads' shares of one (head, dims) become one.
__device__ __forceinline__ Partial merge_sharers(Partial mine) {
#pragma unroll
  for (int x = 1; x < SHARERS; x <<= 1) {
    Partial parts[2];
    parts[0] = mine;
    parts[1].m = __shfl_xor_sync(~0u, mine.m, x);
    parts[1].l = __shfl_xor_sync(~0u, mine.l, x);
#pragma unroll
    for (int e = 0; e < NARROW; ++e) parts[1].o[e] = __shfl_xor_sync(~0u, mine.o[e], x);
    mine = merge(parts);
  }
  return mine;
}

__device__ __forceinline__ void publish_partial(const Consumer& c, const AttentionTask& task, const AttentionScratch& s, uint64_t* out,
                                                uint32_t tag) {
  const int size = HEAD_DIM + PARTIAL_HEAD;
  for (int i = c.warp * 32 + c.lane; i < task.nq * PER_HEAD; i += CONSUMER_THREADS) {
    const int head = i / PER_HEAD, d = i % PER_HEAD * NARROW;
    const Partial merged = merge_warps<false>(s, head, d);
    if (d == 0) {
      publish(out + head * size, as_bits(merged.m), tag);
      publish(out + head * size + 1, as_bits(merged.l), tag);
    }
#pragma unroll
    for (int e = 0; e < NARROW; ++e) publish(out + head * size + PARTIAL_HEAD + d + e, as_bits(merged.o[e]), tag);
  }
}

// Elements of the output: values over the sum.
__device__ __forceinline__ void publish_weighed(uint64_t* out, const Partial& all, uint32_t tag) {
  const float inverse = 1.f / all.l;
  if constexpr (WIDE) publish(out, as_bits(all.o[0] * inverse), tag);
  else publish(out, pack2(all.o[0] * inverse, all.o[NARROW - 1] * inverse), tag);
}

__device__ __forceinline__ void publish_output(Consumer& c, const AttentionTask& task, const AttentionScratch& s,
                                               const uint64_t* partials, int others, const Token& token) {
  const int size = HEAD_DIM + PARTIAL_HEAD, thread = c.warp * 32 + c.lane, share = thread % SHARERS;
  uint64_t* out = c.b.buffer(task.out_buf) + task.q0 * PER_HEAD;
  const uint32_t tag = token.tag(task.out_tag);
  if (others == 0) {  // no other split: a short way, for it is one of the chain of boundaries
#pragma unroll 1
    for (int i = thread; i < task.nq * PER_HEAD; i += CONSUMER_THREADS)
      publish_weighed(out + i, merge_warps<true>(s, i / PER_HEAD, i % PER_HEAD * NARROW), tag);
    return;
  }
  constexpr int ROUNDS = ceil_div(GROUP * PER_HEAD * SHARERS, CONSUMER_THREADS);
  Partial merged[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int i = (thread + round * CONSUMER_THREADS) / SHARERS, head = i / PER_HEAD, d = i % PER_HEAD * NARROW;
    const bool mine = i < task.nq * PER_HEAD;
    if (mine && share < others)
      merged[round] = merge_splits(c, partials + head * size, task.nq * size, share, others, d, token.expect(task.part_tag));
    __syncwarp();
    if (mine && share == 0) {
      Partial both[2] = {merge_warps<true>(s, head, d), merged[round]};
      merged[round] = merge(both);
    }
    __syncwarp();
    merged[round] = merge_sharers(merged[round]);
  }
  c.meet();  // every read of the task comes before its first publish
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int i = (thread + round * CONSUMER_THREADS) / SHARERS;
    if (share == 0 && i < task.nq * PER_HEAD) publish_weighed(out + i, merged[round], tag);
  }
}

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
    softmax.add(s, k, k + KV_BLOCK_ROWS * HD, from, to, task.nq, c.lane);
  };
#else
  BlockSoftmax softmax;
  softmax.begin(s, task.nq, c.lane);
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
    if (seen % CONSUMER_WARPS == c.warp) attend_new_row(s, task.nq, c.lane);
  }
  softmax.finish(s, c.warp, task.nq, c.lane);
  c.meet();

  const int size = task.nq * (HEAD_DIM + PARTIAL_HEAD);
  uint64_t* partials = nullptr;  // a task that is never split has no buffer for them
  if (task.splits > 1) partials = b.buffer(task.part_buf) + task.q0 * (task.splits - 1) * (HEAD_DIM + PARTIAL_HEAD);
  if (tail) publish_output(c, task, s, partials, span.active - 1, token);
  else publish_partial(c, task, s, partials + (task.split - 1) * size, token.tag(task.part_tag));
  c.arrive_done(task.done_counter);
  c.meet();  // scratch may be reused
}
