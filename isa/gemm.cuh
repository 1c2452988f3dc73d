// gemm, storer side: rows of every seat are scaled, biased, added to the residual and published: narrow and interleaved, or in fp32 by seat.
#pragma once
#include "isa/device/matmul.cuh"

__device__ __forceinline__ void store_gemm(Storer& s, const GemmTask& task, const Token& token) {
  const Block& b = s.b;
  const MatVecTask& words = reinterpret_cast<const MatVecTask&>(task);
  const int g = s.lane >> 2, t = s.lane & 3;
  uint64_t* out = b.buffer(task.out_buf) + task.out_start;
  const uint64_t* residual = task.res_buf == NONE ? nullptr : b.buffer(task.res_buf) + task.out_start;
  const Expected want = token.expect(task.res_tag);
  const uint32_t tag = token.tag(task.out_tag);
  ScaledSeats seats(task.flags, task.cols);
  for (int tile = 0; tile < task.tiles; ++tile) {
    const int at = task.tile0 + tile, row = at * TILE_ROWS + t * 4;
    const float4 bias = bias_of(b, words, row);
    const auto packet = [&](int block) { return narrow_packet(2 * at + (t >> 1), block, g, t & 1); };  // rows `row` to row + 3 of seat g
    uint4 old[SEAT_BLOCKS];
#pragma unroll
    for (int i = 0; i < SEAT_BLOCKS; ++i) old[i] = make_uint4(0, 0, 0, 0);
    if (residual) read_pairs_together(s.abort, old, want, [&](int i) { return residual + packet(i); });
    __syncwarp();
    float4 y[SEAT_BLOCKS];
    seats.next(s, tile, y);
#pragma unroll
    for (int block = 0; block < SEAT_BLOCKS; ++block) {
      const uint32_t low = old[block].x, high = old[block].z;
      const float4 v = y[block] + bias + make_float4(unpack_low(low), unpack_high(low), unpack_low(high), unpack_high(high));
      if (task.flags & OUT_BY_SEAT) {
        uint64_t* to = out + (block * 8 + g) * task.rows + row;
        if (row < task.rows) publish(to, as_bits(v.x), tag);
        if (row + 1 < task.rows) publish(to + 1, as_bits(v.y), tag);
        if (row + 2 < task.rows) publish(to + 2, as_bits(v.z), tag);
        if (row + 3 < task.rows) publish(to + 3, as_bits(v.w), tag);
      } else {
        publish_pair(out + packet(block), pack2(v.x, v.y), pack2(v.z, v.w), tag);
      }
    }
  }
}
