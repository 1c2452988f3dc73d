// stretch_attention: the query heads of a KV head for 8 seats, over the KV rows before the stretch and those in it.
//
// The 8 columns of a product are the seats, so each has a mask of its own. A warp has one query head and takes whole blocks in turn with the
// other warps of that head: rows before the stretch lie in the cache, those of the stretch in blocks of the same form.
#pragma once
#include "isa/seat_qkv.cuh"

constexpr int STRETCH_SEATS = 8;
constexpr int HEADS_A_KV_HEAD = HEADS / KV_HEADS;
constexpr int HEAD_WARPS = max_of(1, CONSUMER_WARPS / HEADS_A_KV_HEAD);  // that share a query head

// Of each query head and warp that has it, 8 seats' maximum, sum and output.
struct StretchScratch {
  float* base;
  __device__ float* partial(int share, int head, int seat) const { return base + ((share * HEADS_A_KV_HEAD + head) * STRETCH_SEATS + seat) * PARTIAL_ROW; }
};

// Running softmax of one warp over blocks of 16 rows, seats in the 8 columns: a lane has columns 2t and 2t + 1.
struct StretchSoftmax {
  static constexpr int STEPS = HD / 16;
  static constexpr bool V_EARLY = STEPS <= 4;  // V comes with K where registers allow
  uint2 q[STEPS];
  float m[2], l[2], o[STEPS][4];

  // `from`: q of the head, of the first seat; the others' are `stride` bytes apart.
  __device__ __forceinline__ StretchSoftmax(const uint8_t* from, int stride, int lane) {
    const uint8_t* own = from + (lane >> 2) * stride;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int d = i * 16 + (lane & 3) * 4;
      q[i] = HD == HEAD_DIM || d < HEAD_DIM ? __ldcg(reinterpret_cast<const uint2*>(own + d * ELEMENT_BYTES)) : make_uint2(0, 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) o[i][j] = 0.f;
    }
    m[0] = m[1] = NEG_INF;
    l[0] = l[1] = 0.f;
  }
  // What a warp asks for of a block while it is at those before.
  struct Fetched {
    uint4 k[STEPS], v[V_EARLY ? STEPS : 1];
    __device__ __forceinline__ void fetch(const uint8_t* block, int lane) {
#pragma unroll
      for (int i = 0; i < STEPS; ++i) k[i] = streamed(block, i, lane);
      if constexpr (V_EARLY) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) v[i] = streamed(block + KV_HALF_BYTES, i, lane);
      }
    }
  };
  // The first `count` rows of `block`, of which `fetched` was asked for, row r at position `first` + r, for the seats from position `seat` on.
  __device__ __forceinline__ void add(const Fetched& fetched, const uint8_t* block, int first, int count, int seat, int window, int lane) {
    const int g = lane >> 2, t = lane & 3;
    float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < STEPS; ++i) multiply(d, fetched.k[i], q[i].x, q[i].y);
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
      uint4 v = V_EARLY ? fetched.v[V_EARLY ? i : 0] : streamed(block + KV_HALF_BYTES, i, lane);
      if (count < KV_BLOCK_ROWS) clear_rows(v, count, lane);
      multiply(o[i], v, b0, b1);
    }
  }
  __device__ __forceinline__ void finish(const StretchScratch& s, int share, int head, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int col = 0; col < 2; ++col) {
      float sum = l[col];
#pragma unroll
      for (int x = 4; x < 32; x <<= 1) sum += __shfl_xor_sync(~0u, sum, x);
      float* to = s.partial(share, head, 2 * t + col);
      if (g == 0) { to[0] = m[col]; to[1] = sum; }
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        to[PARTIAL_HEAD + i * 16 + g] = o[i][col];
        to[PARTIAL_HEAD + i * 16 + g + 8] = o[i][col + 2];
      }
    }
  }

 private:
  // The L1 cache keeps nothing: rows of the stretch are other SMs'.
  static __device__ __forceinline__ uint4 streamed(const uint8_t* half, int i, int lane) {
    return __ldcg(reinterpret_cast<const uint4*>(half) + i * 32 + lane);
  }
  static __device__ __forceinline__ uint32_t transposed(uint32_t v) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
  }
};

// Adds the warps' parts of every head, in order, and publishes four columns of a seat at a time as x of the output projection.
__device__ __forceinline__ void publish_heads(const Consumer& c, const StretchAttentionTask& task, const StretchScratch& s) {
  constexpr int QUADS = HEAD_DIM / 4, ALL = HEADS_A_KV_HEAD * STRETCH_SEATS * QUADS;
  uint8_t* out = value(c.b, task.out_buf);
  for (int i = c.warp * 32 + c.lane; i < ALL; i += CONSUMER_THREADS) {
    const int quad = i % QUADS, seat = i / QUADS % STRETCH_SEATS, head = i / QUADS / STRETCH_SEATS;
    float top = NEG_INF, total = 0.f, o[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int share = 0; share < HEAD_WARPS; ++share) top = fmaxf(top, s.partial(share, head, seat)[0]);
#pragma unroll
    for (int share = 0; share < HEAD_WARPS; ++share) {
      const float* part = s.partial(share, head, seat);
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

__device__ __forceinline__ void consume_stretch_attention(Consumer& c, const StretchAttentionTask& task, const Token& token) {
  const Block& b = c.b;
  const StretchScratch s{b.scratch()};
  const int start = (int)token.position, seat = start + task.seat0, rows = task.seat0 + STRETCH_SEATS;
  const int first = task.window ? min_of(start, max_of(0, seat - task.window + 1)) / KV_BLOCK_ROWS : 0;
  const int old_blocks = ceil_div(start, KV_BLOCK_ROWS) - first, blocks = old_blocks + ceil_div(rows, KV_BLOCK_ROWS);
  const int share = c.warp / HEADS_A_KV_HEAD;  // 0 where there are more heads than warps
  c.wait_released();
  uint8_t* own = value(b, task.kv_buf);
#pragma unroll 1
  for (int head = c.warp % HEADS_A_KV_HEAD; head < HEADS_A_KV_HEAD && share < HEAD_WARPS; head += CONSUMER_WARPS) {
    constexpr int STRIDE = HEADS * HEAD_DIM * ELEMENT_BYTES;
    const int place = (task.seat0 * HEADS + task.kv_head * HEADS_A_KV_HEAD + head) * HEAD_DIM;
    StretchSoftmax softmax(value(b, task.q_buf) + place * ELEMENT_BYTES, STRIDE, c.lane);
    auto block_at = [&](int i) {
      return i < old_blocks ? kv_block(b.p, task.layer, task.kv_head, first + i) : stretch_block(own, task.kv_head, i - old_blocks);
    };
    auto add = [&](const StretchSoftmax::Fetched& fetched, int i) {
      const bool is_old = i < old_blocks;
      const int row = is_old ? (first + i) * KV_BLOCK_ROWS : (i - old_blocks) * KV_BLOCK_ROWS;  // of the sequence, or of the stretch
      softmax.add(fetched, block_at(i), is_old ? row : start + row, min_of(KV_BLOCK_ROWS, (is_old ? start : rows) - row), seat, task.window, c.lane);
    };
    // Two blocks are under way: one is asked for in the registers of the one that has just been added.
    StretchSoftmax::Fetched even, odd;
    if (share < blocks) even.fetch(block_at(share), c.lane);
    if (share + HEAD_WARPS < blocks) odd.fetch(block_at(share + HEAD_WARPS), c.lane);
#pragma unroll 1
    for (int i = share; i < blocks; i += 2 * HEAD_WARPS) {
      add(even, i);
      if (i + 2 * HEAD_WARPS < blocks) even.fetch(block_at(i + 2 * HEAD_WARPS), c.lane);
      if (i + HEAD_WARPS >= blocks) break;
      add(odd, i + HEAD_WARPS);
      if (i + 3 * HEAD_WARPS < blocks) odd.fetch(block_at(i + 3 * HEAD_WARPS), c.lane);
    }
    softmax.finish(s, share, head, c.lane);
  }
  c.meet();
  publish_heads(c, task, s);
  release_done(c, task.done_counter);
}
