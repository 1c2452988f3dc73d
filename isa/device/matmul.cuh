// The streamed product of a batch: the weights of the matrix-vector product, chunk by chunk, times x of every seat.
//
// Each consumer warp owns a K slice. The arena holds x as the product's B operands, so a lane's packets of a fragment are its two registers:
// nothing passes through shared memory but what is kept for the task's other tiles, and that only through the lane's own words.
#pragma once
#include "isa/device/batch.cuh"
#include "isa/device/plan.cuh"

constexpr int X_BY_SEAT = 256, OUT_BY_SEAT = 512, X_KEPT = 1024;
constexpr int PAIRS_AT_ONCE = 8;  // pairs of packets that a lane asks for at a time; with 16 registers run out

// x of a warp's slice as operands.
template <int COLUMNS, int FLAGS>
struct SeatSlice {
  using P = Plan<COLUMNS, FLAGS>;
  static_assert(!P::W::QUANTISED, "products of a batch take weights of the machine's elements");
  static constexpr bool NARROW_X = FLAGS & X_NARROW, NORMALISED = FLAGS & X_NORM;
  static_assert(NARROW_X || COLUMNS % 16 == 0, "fp32 packets come in runs of 16 elements");
  static constexpr int PAIRS = NARROW_X ? 1 : 2;            // pairs of packets of one operand
  static constexpr int RUNS = ceil_div(COLUMNS, 8);         // of narrow packets
  static constexpr int AT_ONCE = PAIRS_AT_ONCE / PAIRS;     // operands

  const uint64_t* x;
  const float* gain;
  Expected want;
  int first, count;  // fragments [first, first + count)
  float squares[NORMALISED ? SEAT_BLOCKS : 1];

  __device__ __forceinline__ SeatSlice(const Block& b, const MatVecTask& task, const Token& token, int warp)
      : x(b.buffer(task.x_buf) + task.x_start),
        gain(b.constant(task.gain)),
        want(token.expect(task.x_tag)),
        first(warp * P::LOW + min_of(warp, P::HIGH_WARPS)),
        count(warp < P::HIGH_WARPS ? P::HIGH : P::LOW) {
#pragma unroll
    for (int i = 0; i < (NORMALISED ? SEAT_BLOCKS : 1); ++i) squares[i] = 0.f;
  }
  // Operands of fragments [from, from + N / SEAT_BLOCKS) of the slice, N in all: of each fragment one a seat block. What lies beyond the slice
  // is read from its last fragment and must not be used. `count_squares`: what is read is added to `squares`.
  template <int N>
  __device__ __forceinline__ void load(const Abort& abort, uint2 (&operands)[N], int from, int lane, bool count_squares) {
    constexpr bool WHOLE = P::HIGH_WARPS == 0 && P::HIGH * SEAT_BLOCKS % N == 0;  // nothing lies beyond any warp's slice
#pragma unroll
    for (int base = 0; base < N; base += AT_ONCE) {
      constexpr int MOST = min_of(N, AT_ONCE);
      uint4 v[MOST * PAIRS];
      read_pairs_together(abort, v, want, [&](int i) { return x + packet<WHOLE>(from, min_of(base + i / PAIRS, N - 1), i % PAIRS, lane); });
#pragma unroll
      for (int i = 0; i < MOST; ++i)
        if (base + i < N) operands[base + i] = operand<WHOLE>(&v[i * PAIRS], from, base + i, lane, count_squares);
    }
  }

 private:
  template <bool WHOLE>
  __device__ __forceinline__ int fragment(int from, int number) const {
    const int at = from + number / SEAT_BLOCKS;
    return first + (WHOLE ? at : min_of(at, count - 1));
  }
  // The first packet of half `half` of operand `number`.
  template <bool WHOLE>
  __device__ __forceinline__ int packet(int from, int number, int half, int lane) const {
    const int f = fragment<WHOLE>(from, number), block = number % SEAT_BLOCKS, g = lane >> 2, t = lane & 3;
    if constexpr (!NARROW_X) return wide_packet(f, block, half, lane);
    else if constexpr (FLAGS & X_BY_SEAT) return (block * 8 + g) * (COLUMNS / 2) + min_of(f * 16 + t * 4, COLUMNS - 4) / 2;
    else return narrow_packet(min_of(2 * f + (t >> 1), RUNS - 1), block, g, t & 1);
  }
  template <bool WHOLE>
  __device__ __forceinline__ uint2 operand(const uint4* v, int from, int number, int lane, bool count_squares) {
    const int f = fragment<WHOLE>(from, number), at = f * 16 + (lane & 3) * 4;
    if constexpr (NARROW_X) {
      const bool beyond = COLUMNS % 16 != 0 && at >= RUNS * 8;  // the weights there are zero, but what is read need not be a number
      return beyond ? make_uint2(0, 0) : make_uint2(v[0].x, v[0].z);
    } else {
      float a = as_float(v[0].x), b = as_float(v[0].z), c = as_float(v[1].x), d = as_float(v[1].z);
      if constexpr (NORMALISED) {
        if (count_squares && (WHOLE || from + number / SEAT_BLOCKS < count)) squares[number % SEAT_BLOCKS] += (a * a + b * b) + (c * c + d * d);
        const float4 gains = __ldg(reinterpret_cast<const float4*>(gain + at));
        a *= gains.x, b *= gains.y, c *= gains.z, d *= gains.w;
      }
      return make_uint2(pack2(a, b), pack2(c, d));
    }
  }
};

// Sums of one tile: 16 rows of every seat over the warp's slice. Few seats have several accumulators, so that products need not wait for each
// other.
struct SeatSums {
  static constexpr int SETS = SEAT_BLOCKS >= 4 ? 1 : 4 / SEAT_BLOCKS;
  float acc[SETS][SEAT_BLOCKS][4];

  __device__ __forceinline__ SeatSums() {
#pragma unroll
    for (int i = 0; i < SETS * SEAT_BLOCKS * 4; ++i) acc[i / 4 / SEAT_BLOCKS][i / 4 % SEAT_BLOCKS][i % 4] = 0.f;
  }
  // Lane (g, t) has rows g and g + 8 of seats 2t and 2t + 1 of each block.
  __device__ __forceinline__ void store(float* part, int lane) const {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int block = 0; block < SEAT_BLOCKS; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float sum = acc[0][block][i];
#pragma unroll
        for (int set = 1; set < SETS; ++set) sum += acc[set][block][i];
        part[(block * 8 + t * 2 + i % 2) * SLOT_ROW + g + i / 2 * 8] = sum;
      }
  }
};

template <int COLUMNS, int FLAGS>
__device__ __forceinline__ void multiply_seats(Consumer& c, const MatVecTask& task, const Token& token) {
  using P = Plan<COLUMNS, FLAGS>;
  using S = SeatSlice<COLUMNS, FLAGS>;
  constexpr bool KEPT = FLAGS & X_KEPT;
  // Chunks whose operands are in registers at a time.
  constexpr int GROUP_CHUNKS = KEPT ? 1 : min_of(P::CHUNKS, max_of(1, S::AT_ONCE / (SEAT_BLOCKS * P::PER_CHUNK)));
  constexpr int GROUP_FRAGMENTS = GROUP_CHUNKS * P::PER_CHUNK;
  constexpr int OWN_BYTES = SCRATCH_BYTES / CONSUMER_WARPS / 16 * 16;  // for all shapes alike: another consumer may be at an earlier task
  constexpr int OPERAND_BYTES = 32 * 8;
  static_assert(!KEPT || P::HIGH * SEAT_BLOCKS * OPERAND_BYTES <= OWN_BYTES, "a consumer's share of scratch must hold the slice of x it keeps");
  uint8_t* kept = reinterpret_cast<uint8_t*>(c.b.scratch()) + c.warp * OWN_BYTES + c.lane * 8;
  const int last = c.warp < P::HIGH_WARPS ? P::LAST_HIGH : P::LAST_LOW;  // fragments of this warp in the last chunk of a tile
  const int last_at = (c.warp * P::LAST_LOW + min_of(c.warp, P::HIGH_WARPS)) * FRAGMENT_BYTES;
  const int tiles = task.tiles;

  c.wait_released();
  S slice(c.b, task, token, c.warp);
  if constexpr (KEPT) {
    constexpr int N = S::AT_ONCE, STEP = max_of(1, N / SEAT_BLOCKS);  // fragments at a time
#pragma unroll 1
    for (int from = 0; from < slice.count; from += STEP) {
      uint2 operands[STEP * SEAT_BLOCKS];
      slice.load(c.abort, operands, from, c.lane, true);
#pragma unroll
      for (int i = 0; i < STEP * SEAT_BLOCKS; ++i)
        if (P::HIGH_WARPS == 0 && P::HIGH % STEP == 0 || from + i / SEAT_BLOCKS < slice.count)
          *reinterpret_cast<uint2*>(kept + (from * SEAT_BLOCKS + i) * OPERAND_BYTES) = operands[i];
    }
    __syncwarp();
  }
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    SeatSums sums;
#pragma unroll 1
    for (int group = 0; group < P::CHUNKS; group += GROUP_CHUNKS) {
      uint2 operands[KEPT ? 1 : GROUP_FRAGMENTS * SEAT_BLOCKS];
      if constexpr (!KEPT) {
        if (slice.count) slice.load(c.abort, operands, group * P::PER_CHUNK, c.lane, tile == 0);
        __syncwarp();
      }
#pragma unroll
      for (int d = 0; d < GROUP_CHUNKS; ++d) {
        const int chunk = group + d;
        if (P::CHUNKS % GROUP_CHUNKS != 0 && chunk >= P::CHUNKS) break;
        const bool is_last = chunk + 1 == P::CHUNKS;
        const uint8_t* from = c.wait_chunk() + (is_last ? last_at : c.warp * P::PER_CHUNK * FRAGMENT_BYTES) + c.lane * 16;
        __syncwarp();
        uint32_t read = 0;
#pragma unroll
        for (int j = 0; j < P::PER_CHUNK; ++j) {
          if (is_last && j >= last) continue;
          const uint4 a = *reinterpret_cast<const uint4*>(from + j * FRAGMENT_BYTES);
          read |= a.x;
#pragma unroll
          for (int block = 0; block < SEAT_BLOCKS; ++block) {
            uint2 x;
            if constexpr (KEPT) x = *reinterpret_cast<const uint2*>(kept + ((chunk * P::PER_CHUNK + j) * SEAT_BLOCKS + block) * OPERAND_BYTES);
            else x = operands[(d * P::PER_CHUNK + j) * SEAT_BLOCKS + block];
            multiply(sums.acc[j % SeatSums::SETS][block], a, x.x, x.y);
          }
        }
        c.release_chunk(read);
      }
    }
    if constexpr (S::NORMALISED) {
      if (tile == 0) {
#pragma unroll
        for (int block = 0; block < SEAT_BLOCKS; ++block) {
          float& sum = slice.squares[block];
          sum += __shfl_xor_sync(~0u, sum, 1);
          sum += __shfl_xor_sync(~0u, sum, 2);
        }
      }
    }
    c.wait_reduction_slot();
    __syncwarp();
    float* part = seat_partial(c.b, c.red, c.warp);
    sums.store(part, c.lane);
    if constexpr (S::NORMALISED) {
      if (tile == 0 && (c.lane & 3) == 0) {
#pragma unroll
        for (int block = 0; block < SEAT_BLOCKS; ++block) part[(block * 8 + (c.lane >> 2)) * SLOT_ROW + TILE_ROWS] = slice.squares[block];
      }
    }
    c.fill_reduction_slot();
  }
}

// The storer's side of a tile: rows summed over the warps, in warp order, times each seat's factor of RMS normalisation, which is the same
// for every tile of a task. Lane (g, t) gets rows 4t to 4t + 3 of seat g of each block.
struct ScaledSeats {
  const bool normalised;
  const float inverse_columns;
  float scale[SEAT_BLOCKS];

  __device__ __forceinline__ ScaledSeats(int flags, int columns) : normalised(flags & X_NORM), inverse_columns(1.f / (float)columns) {
#pragma unroll
    for (int block = 0; block < SEAT_BLOCKS; ++block) scale[block] = 1.f;
  }
  __device__ __forceinline__ void next(Storer& s, int tile, float4 (&y)[SEAT_BLOCKS]) {
    Barrier* bar = &s.b.barriers().slot_full[s.red];
    const uint32_t parity = s.red_parity;
    wait_until(s.abort, WAIT_SLOT, [=] { return barrier_passed(bar, parity); });
    __syncwarp();
    const int g = s.lane >> 2, t = s.lane & 3;
#pragma unroll
    for (int block = 0; block < SEAT_BLOCKS; ++block) {
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
      float squares = 0.f;
#pragma unroll
      for (int w = 0; w < CONSUMER_WARPS; ++w) {
        const float* part = seat_partial(s.b, s.red, w) + (block * 8 + g) * SLOT_ROW;
        const float4 v = *reinterpret_cast<const float4*>(part + t * 4);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        if (normalised && tile == 0) squares += part[TILE_ROWS];
      }
      if (normalised && tile == 0) scale[block] = rsqrtf(fmaf(squares, inverse_columns, RMS_EPS));
      y[block] = make_float4(sum.x * scale[block], sum.y * scale[block], sum.z * scale[block], sum.w * scale[block]);
    }
    __syncwarp();
    if (s.lane == 0) barrier_arrive(&s.b.barriers().slot_free[s.red]);
    if (++s.red == REDUCTION_SLOTS) { s.red = 0; s.red_parity ^= 1; }
  }
};

// The bias of rows `row` to row + 3 of a task, zero where there is none or no such row.
__device__ __forceinline__ float4 bias_of(const Block& b, const MatVecTask& task, int row) {
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = task.bias >= 0 && row + i < task.rows ? __ldg(b.constant(task.bias + row + i)) : 0.f;
  return make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Every compiled shape: X(index, columns, flags).
__device__ __forceinline__ void consume_matmul(Consumer& c, const MatVecTask& task, const Token& token) {
  switch (task.shape) {
#define SHAPE_CASE(index, columns, flags) \
  case index: multiply_seats<columns, flags>(c, task, token); return;
    FOR_EACH_SHAPE(SHAPE_CASE)
#undef SHAPE_CASE
  }
}
__device__ __forceinline__ bool stream_matmul(Feeder& f, const MatVecTask& task, const uint8_t*& at, const Token&) {
  switch (task.shape) {
#define SHAPE_CASE(index, columns, flags) \
  case index: return stream_tiles<columns, flags>(f, at, task.tiles);
    FOR_EACH_SHAPE(SHAPE_CASE)
#undef SHAPE_CASE
  }
  return true;
}
