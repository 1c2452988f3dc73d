// What every streamed product has in common: how its tiles are cut into chunks, and how the feeder streams them.
#pragma once
#include "isa/device/weight_format.cuh"

constexpr int X_NARROW = 1, X_NORM = 2;

// How a tile of 16 rows by COLUMNS is cut into chunks and shared among the warps: isa.machine.chunk_plan, at compile time.
template <int COLUMNS, int FLAGS>
struct Plan {
  using W = Weights<FLAGS>;
  static constexpr int PIECES = ceil_div(COLUMNS, W::COLUMNS);
  static constexpr int LOW = PIECES / CONSUMER_WARPS, HIGH_WARPS = PIECES % CONSUMER_WARPS, HIGH = LOW + (HIGH_WARPS > 0);
  static constexpr int FIT = (STAGE_BYTES - W::TAIL_BYTES) / (W::PIECE_BYTES * CONSUMER_WARPS);
  static constexpr int PER_CHUNK = ceil_div(HIGH, ceil_div(HIGH, FIT));
  static constexpr int CHUNKS = ceil_div(HIGH, PER_CHUNK);
  static constexpr int LAST_HIGH = HIGH - (CHUNKS - 1) * PER_CHUNK, LAST_LOW = LOW - (CHUNKS - 1) * PER_CHUNK;
  static constexpr int FULL_BYTES = PER_CHUNK * CONSUMER_WARPS * W::PIECE_BYTES + W::TAIL_BYTES;
  static constexpr int LAST_BYTES = (LAST_LOW * CONSUMER_WARPS + HIGH_WARPS) * W::PIECE_BYTES + W::TAIL_BYTES;
  static constexpr int SLICE = HIGH * W::COLUMNS;  // elements of x a warp keeps, at most
  static constexpr int SLICE_BYTES = SLICE * ELEMENT_BYTES;
};

template <int COLUMNS, int FLAGS>
__device__ __forceinline__ bool stream_tiles(Feeder& f, const uint8_t*& at, int tiles) {
  using P = Plan<COLUMNS, FLAGS>;
  for (int tile = 0; tile < tiles; ++tile)
#pragma unroll 1
    for (int c = 0; c < P::CHUNKS; ++c) {
      const uint32_t bytes = c + 1 < P::CHUNKS ? P::FULL_BYTES : P::LAST_BYTES;
      if (!f.stream(at, bytes)) return false;
      at += bytes;
    }
  return true;
}
