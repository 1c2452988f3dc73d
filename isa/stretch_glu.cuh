// stretch_glu: silu(gate) * up of a group, as x of the next product. Gate row i of a tile and its up row are in one lane.
#pragma once
#include "isa/device/stretch.cuh"

__device__ __forceinline__ bool stream_stretch_glu(Feeder& f, const StretchGluTask& task, const uint8_t*&, const Token& token) {
  return stream_stretch(f, task, token);
}

__device__ __forceinline__ void consume_stretch_glu(Consumer& c, const StretchGluTask& task, const Token&) {
  GroupSums sums(c.warp);
  c.wait_released();
  multiply_stretch(c, task, sums);
  uint8_t* out = value(c.b, task.out_buf);
  const int g = c.lane >> 2, tiles = task.tiles + (task.tiles & 1);  // behind an odd last tile come zeros
  sums.each(c.lane, [&](int tile, int seat, const float (&sum)[4]) {
    const int row = (task.tile0 + tile) * TILE_ROWS + g;
    const bool biased = task.bias >= 0 && row < task.rows;
    const float gate_bias = biased ? __ldg(c.b.constant(task.bias + row)) : 0.f, up_bias = biased ? __ldg(c.b.constant(task.bias + row + 8)) : 0.f;
    const float first = silu(sum[0] + gate_bias) * (sum[2] + up_bias), second = silu(sum[1] + gate_bias) * (sum[3] + up_bias);
    // Lanes of two neighbouring columns share the two seats: each writes both columns of one.
    const bool odd = g & 1;
    const float other = __shfl_xor_sync(~0u, odd ? first : second, 4);
    uint32_t pair = odd ? pack2(other, second) : pack2(first, other);
    const int column = (task.tile0 + tile) * 8 + (g & ~1);
    if (tile >= task.tiles) pair = 0;
    if (tile < tiles) *reinterpret_cast<uint32_t*>(out + x_at(column & ~3, seat + odd) + (column & 2) * 2) = pair;
  });
  release_done(c, task.done_counter);
}
