// filter_head, storer side: logits go to the host's buffer; each tile's scores, with and without noise, and its summary are published.
#pragma once
#include "isa/device/best.cuh"
#include "isa/device/matvec.cuh"
#include "isa/device/sampling.cuh"

constexpr int ROW_PACKETS = 2;
constexpr int TILE_PACKETS = ROW_PACKETS * TILE_ROWS + 4;  // of isa/filter_head.py

__device__ __forceinline__ void store_filter_head(Storer& s, const FilterHeadTask& task, const Token& token) {
  const Block& b = s.b;
  float* logits = reinterpret_cast<float*>(b.p.logits) + (uint64_t)(token.step % b.p.logit_rows) * VOCAB;
  uint64_t* out = b.buffer(task.out_buf) + task.tile0 * TILE_PACKETS;
  const uint32_t tag = token.tag(task.out_tag);
  const float temperature = as_float(b.p.temperature);
  Noise noise(b.p, token.position);
  ScaledRows rows(task.flags, task.cols);
  for (int tile = 0; tile < task.tiles; ++tile) {
    const int row = s.lane & 15, first = (task.tile0 + tile) * TILE_ROWS, r = first + row;
    const bool exists = r < task.rows;
    const float bias = task.bias >= 0 && exists ? __ldg(b.constant(task.bias + r)) : 0.f;
    const float extra = noise.of_tile(first, s.lane);
    const float y = rows.next(s, tile, bias);
    if (s.lane < 16 && exists) logits[r] = y;
    const float score = exists ? score_of(y, temperature) : -FINITE;
    const float noisy = exists ? sum_of(score, extra) : -FINITE;
    uint64_t* at = out + tile * TILE_PACKETS;
    publish(at + ROW_PACKETS * row + (s.lane >> 4), as_bits(s.lane < 16 ? score : noisy), tag);
    float largest = score, best = noisy;
    int best_row = r;
#pragma unroll
    for (int d = 8; d; d >>= 1) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
      keep_best(best, best_row, __shfl_xor_sync(~0u, best, d), __shfl_xor_sync(~0u, best_row, d));
    }
    float sum = exists ? exponential(difference(score, largest)) : 0.f;
#pragma unroll
    for (int d = 8; d; d >>= 1) sum = sum_of(sum, __shfl_xor_sync(~0u, sum, d));
    const uint32_t low = s.lane & 1 ? as_bits(sum) : as_bits(largest), high = s.lane & 1 ? (uint32_t)best_row : as_bits(best);
    if (s.lane < 4) publish(at + ROW_PACKETS * TILE_ROWS + s.lane, s.lane & 2 ? high : low, tag);
  }
}
