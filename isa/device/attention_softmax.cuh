// Attention's arithmetic: one warp's running softmax over blocks of 16 KV rows, and the new row's alone. What it leaves in scratch is a partial
// result a warp: maximum (base 2), sum, and values not yet divided by it.
#pragma once
#include "isa/device/attention_rows.cuh"

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
    float d[4] = {0.f, 0.f, 0.f, 0.f}, odd[4] = {0.f, 0.f, 0.f, 0.f};  // of every other step: two sums that do not wait for each other
    if constexpr (V_EARLY) {
#pragma unroll
      for (int i = 0; i < STEPS; ++i) early[i] = fragment(block + KV_HALF_BYTES, i, lane);
    }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) multiply(i & 1 ? odd : d, fragment(block, i, lane), q[i].x, q[i].y);
    if constexpr (STEPS > 1) {
#pragma unroll
      for (int j = 0; j < 4; ++j) d[j] += odd[j];
    }
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
    for (int x = 4; x < 32; x <<= 1) {
      const float other[2] = {__shfl_xor_sync(~0u, l[0], x), __shfl_xor_sync(~0u, l[1], x)};
      l[0] += other[0];
      l[1] += other[1];
    }
#pragma unroll
    for (int col = 0; col < 2; ++col) {
      const int head = 2 * t + col;
      if (head >= nq) continue;
      float* to = s.partial(part, head);
      if (g == 0) { to[0] = m[col]; to[1] = l[col]; }
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
  constexpr int LANES = 8, AT_ONCE = 32 / LANES, WIDTH = 2 * LANES;
  const int part = lane % LANES;
#pragma unroll
  for (int base = 0; base < GROUP; base += AT_ONCE) {
    const int h = base + lane / LANES;
    float score = 0.f;
    if (h < nq)
#pragma unroll
      for (int i = 0; i < ceil_div(HEAD_DIM, WIDTH); ++i) {
        const int d = 2 * part + i * WIDTH;
        if (HEAD_DIM % WIDTH != 0 && d >= HEAD_DIM) continue;
        const float2 k = *reinterpret_cast<const float2*>(s.new_k() + d);
        const float2 q = query_pair(s, h, d);
        score = fmaf(q.x, k.x, fmaf(q.y, k.y, score));
      }
#pragma unroll
    for (int x = 1; x < LANES; x <<= 1) score += __shfl_xor_sync(~0u, score, x);
    if (h >= nq) continue;
    float* to = s.partial(CONSUMER_WARPS, h);
    if (part == 0) { to[0] = score; to[1] = 1.f; }
#pragma unroll
    for (int i = 0; i < HD / WIDTH; ++i) {  // a padded head has whole runs of 16
      const int d = 2 * part + i * WIDTH;
      *reinterpret_cast<float2*>(to + PARTIAL_HEAD + d) = *reinterpret_cast<const float2*>(s.new_v() + d);
    }
  }
}
