// draw_head, storer side: logits go to the host's buffer; the task's best score with noise is published as two packets (value, row).
#pragma once
#include "isa/device/best.cuh"
#include "isa/device/matvec.cuh"
#include "isa/device/sampling.cuh"

__device__ __forceinline__ void store_draw_head(Storer& s, const DrawHeadTask& task, const Token& token) {
  const Block& b = s.b;
  float* logits = reinterpret_cast<float*>(b.p.logits) + (uint64_t)(token.step % b.p.logit_rows) * VOCAB;
  const uint32_t tag = token.tag(task.out_tag);
  const float temperature = as_float(b.p.temperature);
  Noise noise(b.p, token.position);
  float best = -__int_as_float(0x7f800000);
  int best_row = task.tile0 * TILE_ROWS;
  ScaledRows rows(task.flags, task.cols);
  for (int tile = 0; tile < task.tiles; ++tile) {
    const int first = (task.tile0 + tile) * TILE_ROWS, r = first + (s.lane & 15);
    const float bias = task.bias >= 0 && r < task.rows ? __ldg(b.constant(task.bias + r)) : 0.f;
    const float extra = noise.of_tile(first, s.lane);
    const float y = rows.next(s, tile, bias);
    if (s.lane < 16 && r < task.rows) {
      logits[r] = y;
      keep_best(best, best_row, sum_of(score_of(y, temperature), extra), r);
    }
  }
  warp_best(best, best_row);
  if (s.lane == 0) publish(b.buffer(task.out_buf) + task.out_start, as_bits(best), tag);
  if (s.lane == 1) publish(b.buffer(task.out_buf) + task.out_start + 1, (uint32_t)best_row, tag);
}
