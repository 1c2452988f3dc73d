// gemv_glu_rows: gemv_glu whose consumer warps multiply a tile each and publish it.
#pragma once
#include "isa/gemv_glu.cuh"
#include "isa/device/matvec_rows.cuh"

// 8 gate rows and their 8 up rows give 8 elements: of neighbouring lanes one has gate row g and the other up row g, and lanes 8g publish two.
__device__ __forceinline__ void consume_gemv_glu_rows(Consumer& c, const GemvGluRowsTask& task, const Token& token) {
  uint64_t* out = c.b.buffer(task.out_buf) + task.out_start + (task.tile0 + c.warp) * 4 + (c.lane >> 3);
  const uint32_t tag = token.tag(task.out_tag);
  multiply_by_rows(c, reinterpret_cast<const MatVecTask&>(task), token, [&](int base, float y) {
    const float h = silu(y) * __shfl_xor_sync(~0u, y, 1);
    const float next = __shfl_down_sync(~0u, h, 4);
    if (!(c.lane & 7)) publish(out + base * 4, pack2(h, next), tag);
  });
}
__device__ __forceinline__ void store_gemv_glu_rows(Storer& s, const GemvGluRowsTask&, const Token&) { pass_slot(s); }
