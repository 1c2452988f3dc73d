// gemm_head, storer side: logits of every seat go to the host's buffer; each seat's best one is published as two packets (value, row).
#pragma once
#include "isa/device/best.cuh"
#include "isa/device/matmul.cuh"

__device__ __forceinline__ void store_gemm_head(Storer& s, const GemmHeadTask& task, const Token& token) {
  const Block& b = s.b;
  const MatVecTask& words = reinterpret_cast<const MatVecTask&>(task);
  const int g = s.lane >> 2, t = s.lane & 3;
  float* logits = reinterpret_cast<float*>(b.p.logits) + (uint64_t)(token.step % b.p.logit_rows) * BATCH * VOCAB;
  const uint32_t tag = token.tag(task.out_tag);
  float best[SEAT_BLOCKS];
  int best_row[SEAT_BLOCKS];
#pragma unroll
  for (int block = 0; block < SEAT_BLOCKS; ++block) {
    best[block] = -__int_as_float(0x7f800000);
    best_row[block] = task.tile0 * TILE_ROWS;  // a token that exists even where every logit is NaN: the next step looks it up
  }
  ScaledSeats seats(task.flags, task.cols);
  for (int tile = 0; tile < task.tiles; ++tile) {
    const int row = (task.tile0 + tile) * TILE_ROWS + t * 4;
    const float4 bias = bias_of(b, words, row);
    float4 y[SEAT_BLOCKS];
    seats.next(s, tile, y);
#pragma unroll
    for (int block = 0; block < SEAT_BLOCKS; ++block) {
      const float4 sum = y[block] + bias;
      const float v[4] = {sum.x, sum.y, sum.z, sum.w};
      float* to = logits + (uint64_t)(block * 8 + g) * VOCAB + row;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (row + i < task.rows) {
          to[i] = v[i];
          keep_best(best[block], best_row[block], v[i], row + i);
        }
    }
  }
  uint64_t* out = b.buffer(task.out_buf) + task.out_start;
#pragma unroll
  for (int block = 0; block < SEAT_BLOCKS; ++block) {
#pragma unroll
    for (int d = 1; d < 4; d <<= 1)
      keep_best(best[block], best_row[block], __shfl_xor_sync(~0u, best[block], d), __shfl_xor_sync(~0u, best_row[block], d));
    if (t == 0) {
      publish(out + 2 * (block * 8 + g), as_bits(best[block]), tag);
      publish(out + 2 * (block * 8 + g) + 1, (uint32_t)best_row[block], tag);
    }
  }
}
