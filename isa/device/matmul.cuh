// The streamed product of a batch: the weights of the matrix-vector product, chunk by chunk, times x of every seat.
//
// Each consumer warp owns a K slice. The arena holds x as the product's B operands, so a lane's packets of a fragment are its two registers:
// nothing passes through shared memory but what is kept for the task's other tiles, and that only through the lane's own words.
#pragma once
#include "isa/device/batch.cuh"
#include "isa/device/fetched.cuh"

constexpr int X_BY_SEAT = 256, OUT_BY_SEAT = 512, X_KEPT = 1024;
constexpr int OPERAND_BYTES = 32 * 8;  // of a fragment and seat block, all lanes
// The smallest divisor of n that is at least `least`.
constexpr int smallest_divisor_from(int n, int least) { return n % least ? smallest_divisor_from(n, least + 1) : least; }
constexpr int AT_ONCE = 8;  // pairs of packets, so operands, that a lane asks for at a time; with 16 registers run out

// x of a warp's slice as operands.
template <int COLUMNS, int FLAGS>
struct SeatSlice {
  using P = Plan<COLUMNS, FLAGS>;
  static_assert(!P::W::QUANTISED, "products of a batch take weights of the machine's elements");
  static constexpr bool NORMALISED = FLAGS & X_NORM;
  static_assert(FLAGS & X_NARROW, "products of a batch take narrow packets, a pair for an operand");
  static_assert(!NORMALISED || COLUMNS % 16 == 0, "gains are read by operand");
  static constexpr int RUNS = ceil_div(COLUMNS, 8);

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
  // is read from its last fragment and must not be used. The packets are asked for first, and taken when they are needed.
  template <int N>
  __device__ __forceinline__ void ask(uint4 (&v)[N], int from, int lane) const {
#pragma unroll
    for (int i = 0; i < N; ++i) load_into(v[i], x + packet<whole(N)>(from, i, lane));
  }
  // `count_squares`: what is read is added to `squares`.
  template <int N>
  __device__ __forceinline__ void take(const Abort& abort, uint4 (&v)[N], uint2 (&operands)[N], int from, int lane, bool count_squares) {
    wait_together(abort, v, want, [&](int i) { return x + packet<whole(N)>(from, i, lane); });
#pragma unroll
    for (int i = 0; i < N; ++i) operands[i] = operand<whole(N)>(v[i], from, i, lane, count_squares);
  }
  // N operands at a time never reach beyond any warp's slice, which ends with a chunk.
  static constexpr bool whole(int n) { return P::HIGH_WARPS == 0 && P::LAST_HIGH == P::PER_CHUNK && P::HIGH * SEAT_BLOCKS % n == 0; }

 private:
  template <bool WHOLE>
  __device__ __forceinline__ int fragment(int from, int number) const {
    const int at = from + number / SEAT_BLOCKS;
    return first + (WHOLE ? at : min_of(at, count - 1));
  }
  // The first packet of operand `number`.
  template <bool WHOLE>
  __device__ __forceinline__ int packet(int from, int number, int lane) const {
    const int f = fragment<WHOLE>(from, number), block = number % SEAT_BLOCKS, g = lane >> 2, t = lane & 3;
    if constexpr (FLAGS & X_BY_SEAT) return (block * 8 + g) * (COLUMNS / 2) + min_of(f * 16 + t * 4, COLUMNS - 4) / 2;
    else return narrow_packet(min_of(2 * f + (t >> 1), RUNS - 1), block, g, t & 1);
  }
  template <bool WHOLE>
  __device__ __forceinline__ uint2 operand(const uint4& v, int from, int number, int lane, bool count_squares) {
    const int f = fragment<WHOLE>(from, number), at = f * 16 + (lane & 3) * 4;
    if constexpr (NORMALISED) {
      const float a = unpack_low(v.x), b = unpack_high(v.x), c = unpack_low(v.z), d = unpack_high(v.z);
      if (count_squares && (WHOLE || from + number / SEAT_BLOCKS < count)) squares[number % SEAT_BLOCKS] += (a * a + b * b) + (c * c + d * d);
      const float4 gains = __ldg(reinterpret_cast<const float4*>(gain + at));
      return make_uint2(pack2(a * gains.x, b * gains.y), pack2(c * gains.z, d * gains.w));
    }
    const bool beyond = COLUMNS % 16 != 0 && at >= RUNS * 8;  // the weights there are zero, but what is read need not be a number
    return beyond ? make_uint2(0, 0) : make_uint2(v.x, v.z);
  }
};

// Sums of one tile: 16 rows of every seat over the warp's slice. Few seats have several accumulators, so that products need not wait for each
// other.
struct SeatSums {
  static constexpr int SETS = 4 / SEAT_BLOCKS;
  float acc[SETS][SEAT_BLOCKS][4];

  __device__ __forceinline__ SeatSums() {
#pragma unroll
    for (int i = 0; i < SETS * SEAT_BLOCKS * 4; ++i) acc[i / 4 / SEAT_BLOCKS][i / 4 % SEAT_BLOCKS][i % 4] = 0.f;
  }
  // Adds fragment `a`, the j-th of its chunk, times `x(block)`, the lane's part of the same columns of each seat block.
  template <class X>
  __device__ __forceinline__ void add(int j, const uint4& a, X x) {
#pragma unroll
    for (int block = 0; block < SEAT_BLOCKS; ++block) {
      const uint2 operand = x(block);
      multiply(acc[j % SETS][block], a, operand.x, operand.y);
    }
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

// Hands a tile's sums to the storer; those of the squares with the first.
template <class S>
__device__ __forceinline__ void store_seats(Consumer& c, S& slice, const SeatSums& sums, bool first) {
  if constexpr (S::NORMALISED) {
    if (first) {
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
    if (first && (c.lane & 3) == 0) {
#pragma unroll
      for (int block = 0; block < SEAT_BLOCKS; ++block) part[(block * 8 + (c.lane >> 2)) * SLOT_ROW + TILE_ROWS] = slice.squares[block];
    }
  }
  c.fill_reduction_slot();
}

// Operands of a warp's slice that are read once and serve all tiles of a task: in registers where few are, else in the warp's scratch.
template <class P>
struct SeatOperands {
  static constexpr int COUNT = P::CHUNKS * P::PER_CHUNK * SEAT_BLOCKS;  // those beyond the slice are never used
  static constexpr bool KEPT = 2 * COUNT <= KEPT_SEAT_WORDS;  // as isa.matmul reckons with when it asks for scratch
  uint8_t* own;  // the lane's words of scratch
  uint2 kept[KEPT ? COUNT : 1];

  __device__ __forceinline__ void put(int number, const uint2& operand) {
    if constexpr (KEPT) kept[number] = operand;
    else *reinterpret_cast<uint2*>(own + number * OPERAND_BYTES) = operand;
  }
  __device__ __forceinline__ uint2 get(int number) const {
    if constexpr (KEPT) return kept[number];
    return *reinterpret_cast<const uint2*>(own + number * OPERAND_BYTES);
  }
  // operand(block) of a fragment.
  __device__ __forceinline__ auto at(int fragment) const {
    return [this, fragment](int block) { return get(fragment * SEAT_BLOCKS + block); };
  }
};

// Products with x that is read once. The first chunks are in registers before x is.
template <class P, class S>
__device__ __forceinline__ void multiply_kept(Consumer& c, S& slice, uint8_t* own, int tiles) {
  using O = SeatOperands<P>;
  constexpr int STEP = max_of(1, AT_ONCE / SEAT_BLOCKS), N = STEP * SEAT_BLOCKS;  // fragments, and operands, at a time
  O x{own};
  Fetched<P, (O::KEPT ? 1 : 4)> chunks(c.warp);
#pragma unroll
  for (int d = 0; d < chunks.DEPTH; ++d) chunks.fetch(c, d, d + 1 == P::CHUNKS);
  c.wait_released();
#pragma unroll(O::KEPT ? P::HIGH : 1)
  for (int from = 0; from < P::HIGH; from += STEP) {
    uint4 v[N];
    uint2 operands[N];
    slice.template ask<N>(v, from, c.lane);
    slice.template take<N>(c.abort, v, operands, from, c.lane, true);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (P::HIGH % STEP == 0 || from + i / SEAT_BLOCKS < P::HIGH) x.put(from * SEAT_BLOCKS + i, operands[i]);
  }
  __syncwarp();
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    SeatSums sums;
    multiply_tile<P>(c, chunks, x, sums, tile + 1 == tiles);
    __syncwarp();
    store_seats(c, slice, sums, tile == 0);
  }
}

// Products with x in registers, which is read again for every tile: the packets of the next step are under way while this one's are multiplied.
template <class P, class S>
__device__ __forceinline__ void multiply_passing(Consumer& c, S& slice, int tiles) {
  // A step is some chunks, or an equal part of one: fragments whose operands are in registers at a time.
  constexpr int MOST = max_of(1, AT_ONCE / SEAT_BLOCKS), GROUP = MOST / P::PER_CHUNK >= 2 && P::CHUNKS % 2 == 0 ? 2 : 1;
  constexpr int PARTS = MOST >= P::PER_CHUNK ? 1 : smallest_divisor_from(P::PER_CHUNK, ceil_div(P::PER_CHUNK, MOST));
  constexpr int STEP = GROUP * P::PER_CHUNK / PARTS, N = STEP * SEAT_BLOCKS;
  static_assert(!S::whole(N) || P::CHUNKS * P::PER_CHUNK == P::HIGH, "what lies behind a slice in its last chunk must not be taken for a part of it");
  Fetched<P, GROUP> chunks(c.warp);
  static_assert(chunks.DEPTH == GROUP);
#pragma unroll
  for (int d = 0; d < GROUP; ++d) chunks.fetch(c, d, d + 1 == P::CHUNKS);
  c.wait_released();
  uint4 v[N];
  slice.template ask<N>(v, 0, c.lane);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    SeatSums sums;
#pragma unroll 1
    for (int group = 0; group < P::CHUNKS; group += GROUP) {
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        uint2 operands[N];
        const int from = group * P::PER_CHUNK + part * STEP, next = from + STEP < P::CHUNKS * P::PER_CHUNK ? from + STEP : 0;
        slice.template take<N>(c.abort, v, operands, from, c.lane, tile == 0);
        __syncwarp();
        if (next || tile + 1 < tiles) slice.template ask<N>(v, next, c.lane);
#pragma unroll
        for (int d = 0; d < GROUP; ++d)
          chunks.each(d, group + d + 1 == P::CHUNKS, [&](int j, const uint4& a) {
            if (PARTS == 1 || j / STEP == part)
              sums.add(j, a, [&](int block) { return operands[(d * P::PER_CHUNK + j - part * STEP) * SEAT_BLOCKS + block]; });
          });
      }
      const int after = group + GROUP;
      if (after < P::CHUNKS || tile + 1 < tiles) {
#pragma unroll
        for (int d = 0; d < GROUP; ++d) chunks.fetch(c, d, after + d + 1 == P::CHUNKS || after + d + 1 == 2 * P::CHUNKS);
      }
      __syncwarp();
    }
    store_seats(c, slice, sums, tile == 0);
  }
}

template <int COLUMNS, int FLAGS>
__device__ __forceinline__ void multiply_seats(Consumer& c, const MatVecTask& task, const Token& token) {
  using P = Plan<COLUMNS, FLAGS>;
  using S = SeatSlice<COLUMNS, FLAGS>;
  S slice(c.b, task, token, c.warp);
  if constexpr (FLAGS & X_KEPT || SeatOperands<P>::KEPT) {
    constexpr int OWN_BYTES = SCRATCH_BYTES / CONSUMER_WARPS / 16 * 16;  // for all shapes alike: another consumer may be at an earlier task
    static_assert(SeatOperands<P>::KEPT || P::HIGH * SEAT_BLOCKS * OPERAND_BYTES <= OWN_BYTES, "a consumer's share of scratch must hold the slice of x it keeps");
    multiply_kept<P>(c, slice, reinterpret_cast<uint8_t*>(c.b.scratch()) + c.warp * OWN_BYTES + c.lane * 8, task.tiles);
  } else {
    multiply_passing<P>(c, slice, task.tiles);
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
#pragma unroll
      for (int w = 0; w < CONSUMER_WARPS; ++w) {
        const float4 v = *reinterpret_cast<const float4*>(partial(s, w, block * 8 + g) + t * 4);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      if (normalised && tile == 0) {
        float squares = 0.f;
#pragma unroll
        for (int w = 0; w < CONSUMER_WARPS; ++w) squares += partial(s, w, block * 8 + g)[TILE_ROWS];
        scale[block] = rsqrtf(fmaf(squares, inverse_columns, RMS_EPS));
      }
      y[block] = make_float4(sum.x * scale[block], sum.y * scale[block], sum.z * scale[block], sum.w * scale[block]);
    }
    __syncwarp();
    if (arrives(s.lane)) barrier_arrive(&s.b.barriers().slot_free[s.red]);
    if (++s.red == REDUCTION_SLOTS) { s.red = 0; s.red_parity ^= 1; }
  }

 private:
  static __device__ __forceinline__ const float* partial(const Storer& s, int warp, int seat) {
    return seat_partial(s.b, s.red, warp) + seat * SLOT_ROW;
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
