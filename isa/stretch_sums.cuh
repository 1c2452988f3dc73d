// stretch_sums: a group's sums over a share of K, as fp32.
#pragma once
#include "isa/device/stretch.cuh"

__device__ __forceinline__ bool stream_stretch_sums(Feeder& f, const StretchSumsTask& task, const uint8_t*&, const Token& token) {
  return stream_stretch(f, task, token);
}

__device__ __forceinline__ void consume_stretch_sums(Consumer& c, const StretchSumsTask& task, const Token&) {
  GroupSums sums(c.warp);
  c.wait_released();
  multiply_stretch(c, task, sums);
  float* out = reinterpret_cast<float*>(value(c.b, task.out_buf)) + sum_at(task.share, task.rows, 0, task.tile0 * TILE_ROWS) + (c.lane >> 2);
  sums.each(c.lane, [&](int tile, int seat, const float (&sum)[4]) {
    float* to = out + seat * GROUP_ROWS + tile * TILE_ROWS;
    to[0] = sum[0], to[8] = sum[2];
    to[GROUP_ROWS] = sum[1], to[GROUP_ROWS + 8] = sum[3];
  });
  release_done(c, task.done_counter);
}
