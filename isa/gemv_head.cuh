// gemv_head, storer side: logits go to the host's buffer; the task's best one is published as two packets (value, row).
#pragma once
#include "isa/device/best.cuh"
#include "isa/device/matvec.cuh"

__device__ __forceinline__ void store_gemv_head(Storer& s, const GemvHeadTask& task, const Token& token) {
  const Block& b = s.b;
  float* logits = reinterpret_cast<float*>(b.p.logits) + (uint64_t)(token.step % b.p.logit_rows) * VOCAB;
  const uint32_t tag = token.tag(task.out_tag);
  float best = -__int_as_float(0x7f800000);
  int best_row = task.tile0 * TILE_ROWS;  // a token that exists even where every logit is NaN: the next step looks it up
  uint64_t* out = opaque(b.buffer(task.out_buf) + task.out_start);
  ScaledRows rows(task.flags, task.cols);
  for (int tile = 0; tile < task.tiles; ++tile) {
    const int r = (task.tile0 + tile) * TILE_ROWS + (s.lane & 15);
    const float bias = task.bias >= 0 && r < task.rows ? __ldg(b.constant(task.bias + r)) : 0.f;
    const float y = rows.next(s, tile, bias);
    if (s.lane < 16 && r < task.rows) {
      logits[r] = y;
      keep_best(best, best_row, y, r);
    }
  }
  warp_best(best, best_row);
  if (s.lane == 0) publish(out, as_bits(best), tag);
  if (s.lane == 1) publish(out + 1, (uint32_t)best_row, tag);
}
