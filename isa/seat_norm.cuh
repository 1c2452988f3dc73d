// seat_norm: a seat's residual stream, and its norm as x of a product.
#pragma once
#include "isa/device/stretch.cuh"

// The four columns of a seat that a thread has, `QUADS` times.
struct SeatRow {
  static constexpr int QUADS = ceil_div(HIDDEN / 4, CONSUMER_THREADS);
  float4 h[QUADS];
  static __device__ __forceinline__ int column(const Consumer& c, int i) { return (i * CONSUMER_THREADS + c.warp * 32 + c.lane) * 4; }
  static __device__ __forceinline__ bool has(int column) { return HIDDEN / 4 % CONSUMER_THREADS == 0 || column < HIDDEN; }
  // visit(column, quad) for each.
  template <class Visit>
  __device__ __forceinline__ void each(const Consumer& c, Visit visit) {
#pragma unroll
    for (int i = 0; i < QUADS; ++i)
      if (has(column(c, i))) visit(column(c, i), h[i]);
  }
};

__device__ __forceinline__ void consume_seat_norm(Consumer& c, const SeatNormTask& task, const Token&) {
  const Block& b = c.b;
  SeatRow row;
  c.wait_released();
  if (task.res_buf == NONE) {
    const int32_t token = __ldg(reinterpret_cast<const int32_t*>(b.p.tokens_in) + task.seat);
    const uint16_t* from = reinterpret_cast<const uint16_t*>(b.p.embedding) + (uint64_t)(uint32_t)token * HIDDEN;
    row.each(c, [&](int column, float4& h) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(from + column));
      h = make_float4(unpack_low(v.x), unpack_high(v.x), unpack_low(v.y), unpack_high(v.y));
    });
  } else {
    const float* residual = reinterpret_cast<const float*>(value(b, task.res_buf)) + task.seat * HIDDEN;
    const float* sums = reinterpret_cast<const float*>(value(b, task.sums_buf));
#pragma unroll
    for (int i = 0; i < SeatRow::QUADS; ++i) {
      const int column = min_of(SeatRow::column(c, i), HIDDEN - 4);  // of a thread that has none, the last: nobody publishes it
      const float4 before = __ldcg(reinterpret_cast<const float4*>(residual + column));
      row.h[i] = before;
      add_to(row.h[i], added_shares(sums, task.shares, HIDDEN, task.seat, column));
    }
  }
  float squares = 0.f;
  float* stream = reinterpret_cast<float*>(value(b, task.h_buf)) + task.seat * HIDDEN;
  row.each(c, [&](int column, float4& h) {
    if (task.bias >= 0) add_to(h, __ldg(reinterpret_cast<const float4*>(b.constant(task.bias + column))));
    *reinterpret_cast<float4*>(stream + column) = h;
    squares += (h.x * h.x + h.y * h.y) + (h.z * h.z + h.w * h.w);
  });
  squares = warp_sum(squares);
  if (c.lane == 0) b.scratch()[c.warp] = squares;
  c.meet();
  squares = 0.f;
#pragma unroll
  for (int w = 0; w < CONSUMER_WARPS; ++w) squares += b.scratch()[w];
  const float scale = rsqrtf(fmaf(squares, 1.f / (float)HIDDEN, RMS_EPS));
  uint8_t* x = value(b, task.x_buf);
  row.each(c, [&](int column, float4& h) {
    const float4 gain = __ldg(reinterpret_cast<const float4*>(b.constant(task.gain + column)));
    *reinterpret_cast<uint2*>(x + x_at(column, task.seat)) =
        make_uint2(pack2(h.x * scale * gain.x, h.y * scale * gain.y), pack2(h.z * scale * gain.z, h.w * scale * gain.w));
  });
  release_done(c, task.done_counter);
}
