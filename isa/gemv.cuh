// gemv, storer side: rows are scaled, biased, added to the residual and published as fp32 packets.
#pragma once
#include "isa/device/matvec.cuh"

__device__ __forceinline__ void store_gemv(Storer& s, const GemvTask& task, const Token& token) {
  const Block& b = s.b;
  const int row = s.lane & 15;
  uint64_t* out = b.buffer(task.out_buf) + task.out_start;
  const uint64_t* residual = task.res_buf == NONE ? nullptr : b.buffer(task.res_buf) + task.out_start;
  const Expected want = token.expect(task.res_tag);
  const uint32_t tag = token.tag(task.out_tag);
  ScaledRows rows(task.flags, task.cols);
  for (int tile = 0; tile < task.tiles; ++tile) {
    const int r = (task.tile0 + tile) * TILE_ROWS + row;
    const bool mine = s.lane < 16 && r < task.rows;
    float extra = 0.f;
    if (mine && task.bias >= 0) extra = __ldg(b.constant(task.bias + r));
    if (mine && residual) extra += s.read(residual + r, want);
    __syncwarp();
    uint64_t* to = opaque(out + r);
    const float y = rows.next(s, tile, extra);
    if (mine) publish(to, as_bits(y), tag);
  }
}
