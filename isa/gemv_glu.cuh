// gemv_glu, storer side: 8 gate rows and their 8 up rows give 8 elements silu(gate) * up, published narrow.
#pragma once
#include "isa/device/matvec.cuh"

__device__ __forceinline__ void store_gemv_glu(Storer& s, const GemvGluTask& task, const Token& token) {
  const Block& b = s.b;
  const int row = s.lane & 15;
  uint64_t* out = b.buffer(task.out_buf) + task.out_start;
  const uint32_t tag = token.tag(task.out_tag);
  ScaledRows rows(task.flags, task.cols);
  for (int tile = 0; tile < task.tiles; ++tile) {
    const int t = task.tile0 + tile;
    const float bias = task.bias >= 0 ? __ldg(b.constant(task.bias + t * TILE_ROWS + row)) : 0.f;
    uint64_t* to = opaque(out + (WIDE ? t * 8 + s.lane : t * 4 + (s.lane >> 1)));
    const float y = rows.next(s, tile, bias);
    const float up = __shfl_down_sync(~0u, y, 8);
    const float h = silu(y) * up;
    const float next = __shfl_down_sync(~0u, h, 1);
    if constexpr (WIDE) {
      if (s.lane < 8) publish(to, as_bits(h), tag);
    } else if (s.lane < 8 && !(s.lane & 1)) {
      publish(to, pack2(h, next), tag);
    }
  }
}
