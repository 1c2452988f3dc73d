// gemm_glu, storer side: 8 gate rows and their 8 up rows give 8 elements silu(gate) * up of every seat, published narrow and interleaved.
#pragma once
#include "isa/device/matmul.cuh"

__device__ __forceinline__ void store_gemm_glu(Storer& s, const GemmGluTask& task, const Token& token) {
  const Block& b = s.b;
  const MatVecTask& words = reinterpret_cast<const MatVecTask&>(task);
  const int g = s.lane >> 2, t = s.lane & 3;
  uint64_t* out = b.buffer(task.out_buf) + task.out_start;
  const uint32_t tag = token.tag(task.out_tag);
  ScaledSeats seats(task.flags, task.cols);
  for (int tile = 0; tile < task.tiles; ++tile) {
    const int at = task.tile0 + tile;
    const float4 bias = bias_of(b, words, at * TILE_ROWS + t * 4);
    float4 y[SEAT_BLOCKS];
    seats.next(s, tile, y);
#pragma unroll
    for (int block = 0; block < SEAT_BLOCKS; ++block) {
      const float4 v = y[block] + bias;
      // Lanes with t below 2 have gate rows; the up rows of the same elements are two lanes further.
      const float a = silu(v.x) * __shfl_down_sync(~0u, v.x, 2), b1 = silu(v.y) * __shfl_down_sync(~0u, v.y, 2);
      const float c = silu(v.z) * __shfl_down_sync(~0u, v.z, 2), d = silu(v.w) * __shfl_down_sync(~0u, v.w, 2);
      if (t < 2) {
        uint64_t* to = out + narrow_packet(at, block, g, t);
        publish_pair(to, pack2(a, b1), pack2(c, d), tag);
      }
    }
  }
}
