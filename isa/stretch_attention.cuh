// stretch_attention: the query heads of a KV head for 8 seats, over the KV rows before the stretch and those in it.
//
// The 8 columns of a product are the seats, so each has a mask of its own. Warps take whole blocks in turn, and some heads at a time, so that a
// block is read once for them: rows before the stretch lie in the cache, those of the stretch in blocks of the same form.
#pragma once
#include "isa/seat_qkv.cuh"

constexpr int STRETCH_SEATS = 8;
constexpr int HEADS_A_KV_HEAD = HEADS / KV_HEADS;
constexpr int HEAD_STEPS = HD / 16;
// The largest divisor of n that is at most `most`.
constexpr int largest_divisor_to(int n, int most) { return n % most ? largest_divisor_to(n, most - 1) : most; }
// Heads that a warp takes at once: with a block's K and V and each head's output, sums and scores in at most 128 registers.
constexpr int MOST_HEADS_AT_ONCE = max_of(1, (128 - 8 * HEAD_STEPS) / (4 * HEAD_STEPS + 8));
constexpr int HEADS_AT_ONCE = largest_divisor_to(HEADS_A_KV_HEAD, min_of(HEADS_A_KV_HEAD, MOST_HEADS_AT_ONCE));

// q of every head as the products' B operands; then, for one head at a time, of each warp and seat maximum, sum and output.
struct StretchScratch {
  uint8_t* base;
  __device__ uint2& q(int head, int step, int lane) const { return reinterpret_cast<uint2*>(base)[(head * HEAD_STEPS + step) * 32 + lane]; }
  __device__ float* partial(int warp, int seat) const {
    return reinterpret_cast<float*>(base + HEADS_A_KV_HEAD * HEAD_STEPS * 256) + (warp * STRETCH_SEATS + seat) * PARTIAL_ROW;
  }
};

// Fragments of K or V of a block. The L1 cache keeps none: rows of the stretch are other SMs'.
struct BlockHalf {
  uint4 fragments[HEAD_STEPS];
  __device__ __forceinline__ void fetch(const uint8_t* half, int lane) {
#pragma unroll
    for (int i = 0; i < HEAD_STEPS; ++i) fragments[i] = __ldcg(reinterpret_cast<const uint4*>(half) + i * 32 + lane);
  }
};
__device__ __forceinline__ uint32_t transposed(uint32_t v) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// Running softmax of one head over blocks of 16 rows, seats in the 8 columns: a lane has columns 2t and 2t + 1.
struct StretchSoftmax {
  float m[2] = {NEG_INF, NEG_INF}, l[2] = {0.f, 0.f}, o[HEAD_STEPS][4];

  __device__ __forceinline__ StretchSoftmax() {
#pragma unroll
    for (int i = 0; i < HEAD_STEPS * 4; ++i) o[i / 4][i % 4] = 0.f;
  }
  // Scores of a block become probabilities, which are rounded; what was summed before is scaled to the new maximum. `low` and `high` say whether
  // the lane's two rows are seen by each of its seats.
  __device__ __forceinline__ void add_scores(float (&d)[4], const bool (&low)[2], const bool (&high)[2]) {
#pragma unroll
    for (int col = 0; col < 2; ++col) {
      if (!low[col]) d[col] = NEG_INF;
      if (!high[col]) d[col + 2] = NEG_INF;
      float top = fmaxf(d[col], d[col + 2]);
#pragma unroll
      for (int x = 4; x < 32; x <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
      const float old = m[col];
      m[col] = fmaxf(old, top);
      const float scale = fast_exp2(old - m[col]);
      d[col] = low[col] ? round_element(fast_exp2(d[col] - m[col])) : 0.f;
      d[col + 2] = high[col] ? round_element(fast_exp2(d[col + 2] - m[col])) : 0.f;
      l[col] = l[col] * scale + d[col] + d[col + 2];
#pragma unroll
      for (int i = 0; i < HEAD_STEPS; ++i) { o[i][col] *= scale; o[i][col + 2] *= scale; }
    }
  }
  __device__ __forceinline__ void add_values(const float (&p)[4], const BlockHalf& v) {
    const uint32_t b0 = transposed(pack2(p[0], p[1])), b1 = transposed(pack2(p[2], p[3]));
#pragma unroll
    for (int i = 0; i < HEAD_STEPS; ++i) multiply(o[i], v.fragments[i], b0, b1);
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
      for (int i = 0; i < HEAD_STEPS; ++i) {
        to[PARTIAL_HEAD + i * 16 + g] = o[i][col];
        to[PARTIAL_HEAD + i * 16 + g + 8] = o[i][col + 2];
      }
    }
  }
};

// The KV blocks that a task sees, in order: those of the cache, then those of the stretch.
struct StretchBlocks {
  const Params& p;
  uint8_t* own;
  int layer, kv_head, start, rows, first, old, count;

  __device__ __forceinline__ StretchBlocks(const Block& b, const StretchAttentionTask& task, const Token& token)
      : p(b.p), own(value(b, task.kv_buf)), layer(task.layer), kv_head(task.kv_head), start((int)token.position), rows(task.seat0 + STRETCH_SEATS) {
    first = task.window ? min_of(start, max_of(0, start + task.seat0 - task.window + 1)) / KV_BLOCK_ROWS : 0;
    old = ceil_div(start, KV_BLOCK_ROWS) - first;
    count = old + ceil_div(rows, KV_BLOCK_ROWS);
  }
  __device__ __forceinline__ const uint8_t* at(int i) const {
    return i < old ? kv_block(p, layer, kv_head, first + i) : stretch_block(own, kv_head, i - old);
  }
  // The position of a block's first row, and how many of its rows there are.
  __device__ __forceinline__ int position(int i) const { return i < old ? (first + i) * KV_BLOCK_ROWS : start + (i - old) * KV_BLOCK_ROWS; }
  __device__ __forceinline__ int height(int i) const { return min_of(KV_BLOCK_ROWS, (i < old ? start : start + rows) - position(i)); }
};

// A warp's blocks for heads [head, head + HEADS_AT_ONCE). K of a block is asked for when the scores of the one before are made, V when its
// outputs are.
__device__ __forceinline__ void attend(StretchSoftmax (&softmax)[HEADS_AT_ONCE], const StretchBlocks& blocks, const StretchScratch& s, int head,
                                       int warp, int lane, int seat, int window) {
  const int g = lane >> 2, t = lane & 3;
  if (warp >= blocks.count) return;
  BlockHalf k, v;
  k.fetch(blocks.at(warp), lane);
  v.fetch(blocks.at(warp) + KV_HALF_BYTES, lane);
#pragma unroll 1
  for (int i = warp; i < blocks.count; i += CONSUMER_WARPS) {
    const int position = blocks.position(i), height = blocks.height(i), next = i + CONSUMER_WARPS;
    float d[HEADS_AT_ONCE][4];
#pragma unroll
    for (int h = 0; h < HEADS_AT_ONCE; ++h) {
#pragma unroll
      for (int j = 0; j < 4; ++j) d[h][j] = 0.f;
#pragma unroll
      for (int step = 0; step < HEAD_STEPS; ++step) {
        const uint2 q = s.q(head + h, step, lane);
        multiply(d[h], k.fragments[step], q.x, q.y);
      }
    }
    if (next < blocks.count) k.fetch(blocks.at(next), lane);
    bool low[2], high[2];
#pragma unroll
    for (int col = 0; col < 2; ++col) {
      const int low_age = seat + 2 * t + col - (position + g), high_age = low_age - 8;
      low[col] = g < height && low_age >= 0 && (window == 0 || low_age < window);
      high[col] = g + 8 < height && high_age >= 0 && (window == 0 || high_age < window);
    }
#pragma unroll
    for (int h = 0; h < HEADS_AT_ONCE; ++h) softmax[h].add_scores(d[h], low, high);
    if (height < KV_BLOCK_ROWS) {
#pragma unroll
      for (int step = 0; step < HEAD_STEPS; ++step) clear_rows(v.fragments[step], height, lane);
    }
#pragma unroll
    for (int h = 0; h < HEADS_AT_ONCE; ++h) softmax[h].add_values(d[h], v);
    if (next < blocks.count) v.fetch(blocks.at(next) + KV_HALF_BYTES, lane);
  }
}

// Adds the warps' parts of a head, in order, and publishes four columns of a seat at a time as x of the output projection.
__device__ __forceinline__ void publish_head(const Consumer& c, const StretchAttentionTask& task, const StretchScratch& s, int head) {
  constexpr int QUADS = HEAD_DIM / 4;
  uint8_t* out = value(c.b, task.out_buf);
  for (int i = c.warp * 32 + c.lane; i < STRETCH_SEATS * QUADS; i += CONSUMER_THREADS) {
    const int quad = i % QUADS, seat = i / QUADS;
    float top = NEG_INF, total = 0.f, o[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int w = 0; w < CONSUMER_WARPS; ++w) top = fmaxf(top, s.partial(w, seat)[0]);
#pragma unroll
    for (int w = 0; w < CONSUMER_WARPS; ++w) {
      const float* part = s.partial(w, seat);
      const float scale = fast_exp2(part[0] - top);
      total += part[1] * scale;
#pragma unroll
      for (int e = 0; e < 4; ++e) o[e] += part[PARTIAL_HEAD + quad * 4 + e] * scale;
    }
    const float inverse = 1.f / total;  // a seat sees at least its own row
    const int column = (task.kv_head * HEADS_A_KV_HEAD + head) * HEAD_DIM + quad * 4;
    *reinterpret_cast<uint2*>(out + x_at(column, task.seat0 + seat)) = make_uint2(pack2(o[0] * inverse, o[1] * inverse), pack2(o[2] * inverse, o[3] * inverse));
  }
}

// q of the task's heads in scratch, as a product's lanes take it: dims past the head's are zero.
__device__ __forceinline__ void load_queries(const Consumer& c, const StretchAttentionTask& task, const StretchScratch& s) {
  const uint8_t* q = value(c.b, task.q_buf);
  const int seat = task.seat0 + (c.lane >> 2), first = task.kv_head * HEADS_A_KV_HEAD;
#pragma unroll 4
  for (int i = c.warp; i < HEADS_A_KV_HEAD * HEAD_STEPS; i += CONSUMER_WARPS) {
    const int head = i / HEAD_STEPS, step = i % HEAD_STEPS, d = step * 16 + (c.lane & 3) * 4;
    const uint2* from = reinterpret_cast<const uint2*>(q + ((uint64_t)(seat * HEADS + first + head) * HEAD_DIM + d) * ELEMENT_BYTES);
    s.q(head, step, c.lane) = HD == HEAD_DIM || d < HEAD_DIM ? __ldcg(from) : make_uint2(0, 0);
  }
}

__device__ __forceinline__ void consume_stretch_attention(Consumer& c, const StretchAttentionTask& task, const Token& token) {
  const StretchScratch s{reinterpret_cast<uint8_t*>(c.b.scratch())};
  const StretchBlocks blocks(c.b, task, token);
  c.wait_released();
  load_queries(c, task, s);
  c.meet();
#pragma unroll 1
  for (int head = 0; head < HEADS_A_KV_HEAD; head += HEADS_AT_ONCE) {
    StretchSoftmax softmax[HEADS_AT_ONCE];
    attend(softmax, blocks, s, head, c.warp, c.lane, (int)token.position + task.seat0, task.window);
#pragma unroll
    for (int h = 0; h < HEADS_AT_ONCE; ++h) {
      softmax[h].finish(s, c.warp, c.lane);
      c.meet();
      publish_head(c, task, s, head + h);
      c.meet();  // the parts have been read
    }
  }
  release_done(c, task.done_counter);
}
