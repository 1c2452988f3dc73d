// The streamed product of a batch: the weights of the matrix-vector product, chunk by chunk, times x of every seat.
//
// Each consumer warp owns a K slice. The arena holds x as the product's B operands, so a lane's packets of a fragment are its two registers:
// nothing passes through shared memory but what is kept for the task's other tiles, and that only through the lane's own words.
#pragma once
#include "isa/device/batch.cuh"
#include "isa/device/fetched.cuh"

constexpr int X_BY_SEAT = 256, OUT_BY_SEAT = 512, X_KEPT = 1024;
// Pairs of packets that a lane has asked for at a time: fp32 and narrow ones of operands that stay in registers, and those of others. More make
// registers spill.
constexpr int WIDE_IN_FLIGHT = 12, NARROW_IN_FLIGHT = SEAT_BLOCKS == 1 ? 16 : 12, STREAMED_IN_FLIGHT = 8;
constexpr int CHUNKS_FETCHED = SEAT_BLOCKS == 1 ? 2 : 1;  // before x is there
constexpr int SEAT_WORDS = 40;     // registers a lane may spend on operands that it keeps: isa.matmul.SEAT_WORDS

// Where a warp's slice of x lies, and what its packets are as operands.
template <int COLUMNS, int FLAGS>
struct SeatSlice {
  using P = Plan<COLUMNS, FLAGS>;
  static_assert(!P::W::QUANTISED, "products of a batch take weights of the machine's elements");
  static constexpr bool NARROW_X = FLAGS & X_NARROW, NORMALISED = FLAGS & X_NORM;
  static constexpr bool ALIGNED = COLUMNS % 16 == 0;  // fragments have all their columns
  static_assert(NARROW_X || ALIGNED, "fp32 packets come in runs of 16 elements");
  static constexpr int PAIRS = NARROW_X ? 1 : 2;  // pairs of packets of one operand
  static constexpr int RUNS = ceil_div(COLUMNS, 8);  // of narrow packets

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
  // Asks for the gains, so that they are near when x arrives.
  __device__ __forceinline__ void touch_gain(int lane) const {
    if constexpr (NORMALISED)
      for (int at = lane * 8; at < count * 16; at += 256) touch(gain + first * 16 + at);
  }
  // The first packet of half `half` of fragment `f` for seats of `block`.
  __device__ __forceinline__ const uint64_t* packet(int f, int block, int half, int lane) const {
    const int g = lane >> 2, t = lane & 3;
    if constexpr (!NARROW_X) return x + wide_packet(f, block, half, lane);
    else if constexpr (FLAGS & X_BY_SEAT) return x + (block * 8 + g) * (COLUMNS / 2) + (ALIGNED ? f * 8 + t * 2 : min_of(f * 16 + t * 4, COLUMNS - 4) / 2);
    else return x + narrow_packet(ALIGNED ? 2 * f + (t >> 1) : min_of(2 * f + (t >> 1), RUNS - 1), block, g, t & 1);
  }
  // The operand of fragment `f`. `count_squares`: what is read is added to `squares`.
  __device__ __forceinline__ uint2 operand(const uint4* v, int f, int block, int lane, bool count_squares) {
    const int at = f * 16 + (lane & 3) * 4;
    if constexpr (NARROW_X) {
      const bool beyond = !ALIGNED && at >= RUNS * 8;  // the weights there are zero, but what is read need not be a number
      return beyond ? make_uint2(0, 0) : make_uint2(v[0].x, v[0].z);
    } else {
      float a = as_float(v[0].x), b = as_float(v[0].z), c = as_float(v[1].x), d = as_float(v[1].z);
      if constexpr (NORMALISED) {
        if (count_squares) squares[block] += (a * a + b * b) + (c * c + d * d);
        const float4 gains = __ldg(reinterpret_cast<const float4*>(gain + at));
        a *= gains.x, b *= gains.y, c *= gains.z, d *= gains.w;
      }
      return make_uint2(pack2(a, b), pack2(c, d));
    }
  }
  __device__ __forceinline__ void sum_squares() {
    if constexpr (NORMALISED)
#pragma unroll
      for (int block = 0; block < SEAT_BLOCKS; ++block) {
        squares[block] += __shfl_xor_sync(~0u, squares[block], 1);
        squares[block] += __shfl_xor_sync(~0u, squares[block], 2);
      }
  }
};

// Packets of x on their way to registers: up to SLOTS steps of FRAGMENTS fragments each, asked for long before they are looked at. A step
// always has the same registers, and all are asked for under no condition: a fragment beyond the slice is its last one (of an empty slice the one before
// it), and must not be used. ALL: fragments of all steps.
template <int COLUMNS, int FLAGS, int FRAGMENTS, int SLOTS, int ALL>
struct SeatWindow {
  using S = SeatSlice<COLUMNS, FLAGS>;
  static constexpr int OPERANDS = FRAGMENTS * SEAT_BLOCKS;
  static constexpr bool WHOLE = S::P::HIGH_WARPS == 0 && S::P::HIGH == ALL;  // nothing lies beyond any slice
  uint4 v[SLOTS][OPERANDS * S::PAIRS];
  int at[SLOTS];  // the first fragment of each slot's step

  // Asks for the step that begins with fragment `from` of the slice.
  __device__ __forceinline__ void ask(const S& s, int slot, int from, int lane) {
    at[slot] = from;
#pragma unroll
    for (int i = 0; i < OPERANDS * S::PAIRS; ++i) load_into(v[slot][i], source(s, from, i, lane));
  }
  // The operands of a slot's step: of each fragment one a seat block.
  __device__ __forceinline__ void take(S& s, const Abort& abort, int slot, int lane, bool count_squares, uint2 (&operands)[OPERANDS]) {
    if (!here(s, slot)) wait(s, abort, slot, lane);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < OPERANDS; ++i) {
      const bool counted = count_squares && (WHOLE || at[slot] + i / SEAT_BLOCKS < s.count);
      operands[i] = s.operand(&v[slot][i * S::PAIRS], fragment(s, at[slot], i), i % SEAT_BLOCKS, lane, counted);
    }
  }

 private:
  static __device__ __forceinline__ int fragment(const S& s, int from, int operand) {
    const int f = from + operand / SEAT_BLOCKS;
    return s.first + (WHOLE ? f : min_of(f, s.count - 1));
  }
  static __device__ __forceinline__ const uint64_t* source(const S& s, int from, int pair, int lane) {
    const int operand = pair / S::PAIRS;
    return s.packet(fragment(s, from, operand), operand % SEAT_BLOCKS, pair % S::PAIRS, lane);
  }
  // No predicates: they are few, and a check that needs many waits for one packet after another.
  __device__ __forceinline__ bool here(const S& s, int slot) const {
    uint32_t wrong = 0;
#pragma unroll
    for (int i = 0; i < OPERANDS * S::PAIRS; ++i) wrong |= (v[slot][i].y ^ s.want.tag) | (v[slot][i].w ^ s.want.tag);
    return (wrong & s.want.mask) == 0;
  }
  // Asks again, until the step is there, for all steps that are not: they were asked for before it came, and come with it as a rule.
  __device__ __forceinline__ void wait(const S& s, const Abort& abort, int slot, int lane) {
    wait_until(abort, WAIT_TAG, [&] {
#pragma unroll
      for (int i = 0; i < SLOTS; ++i)
        if (!here(s, i)) ask(s, i, at[i], lane);
      return here(s, slot);
    });
  }
};

// The operands of one fragment.
struct SeatOperands {
  uint2 v[SEAT_BLOCKS];
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
  // Adds fragment `a`, the j-th of its chunk, times its operands.
  __device__ __forceinline__ void add(int j, const uint4& a, const SeatOperands& x) {
#pragma unroll
    for (int block = 0; block < SEAT_BLOCKS; ++block) multiply(acc[j % SETS][block], a, x.v[block].x, x.v[block].y);
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

// Whether a lane keeps the operands of its warp's slice in registers.
template <int COLUMNS, int FLAGS>
constexpr bool IN_REGISTERS = Plan<COLUMNS, FLAGS>::HIGH * SEAT_BLOCKS * 2 <= SEAT_WORDS;

// The first of 4, 2, 3 and 1 that divides `chunks` and is no more than `most`.
constexpr int steps_of(int chunks, int most) {
  return most >= 4 && chunks % 4 == 0 ? 4 : most >= 2 && chunks % 2 == 0 ? 2 : most >= 3 && chunks % 3 == 0 ? 3 : 1;
}

// Operands of the whole slice, read once a task: in registers where they fit into some, else in the warp's own part of scratch.
template <int COLUMNS, int FLAGS>
struct KeptSeats {
  using S = SeatSlice<COLUMNS, FLAGS>;
  using P = Plan<COLUMNS, FLAGS>;
  static constexpr bool WORDS = IN_REGISTERS<COLUMNS, FLAGS>;
  static constexpr int CHUNKS_AT_ONCE = 1, ROUNDS = WORDS ? P::CHUNKS : 1;  // how the loop over a tile's chunks is unrolled
  static constexpr int STEP = max_of(1, 2 / (SEAT_BLOCKS * S::PAIRS)), STEPS = ceil_div(P::HIGH, STEP);
  static constexpr int PAIRS_IN_FLIGHT = !WORDS ? STREAMED_IN_FLIGHT : S::NARROW_X ? NARROW_IN_FLIGHT : WIDE_IN_FLIGHT;
  static constexpr int SLOTS = min_of(STEPS, max_of(1, PAIRS_IN_FLIGHT / (STEP * SEAT_BLOCKS * S::PAIRS)));
  static constexpr int TAKEN = WORDS ? STEPS : ceil_div(STEPS, SLOTS) * SLOTS;  // a loop that is not unrolled takes whole rounds
  static constexpr int OWN_BYTES = SCRATCH_BYTES / CONSUMER_WARPS / 16 * 16;  // for all shapes alike: another consumer may be at an earlier task
  static constexpr int OPERAND_BYTES = 32 * 8;
  static_assert(WORDS || P::HIGH * SEAT_BLOCKS * OPERAND_BYTES <= OWN_BYTES, "a consumer's share of scratch must hold the slice of x it keeps");

  uint8_t* scratch;
  uint2 kept[WORDS ? max_of(STEPS * STEP, P::CHUNKS * P::PER_CHUNK) * SEAT_BLOCKS : 1];  // those beyond the slice are never used

  __device__ __forceinline__ KeptSeats(Consumer& c) : scratch(reinterpret_cast<uint8_t*>(c.b.scratch()) + c.warp * OWN_BYTES + c.lane * 8) {}
  __device__ __forceinline__ void begin(Consumer& c, S& slice) {
    SeatWindow<COLUMNS, FLAGS, STEP, SLOTS, TAKEN * STEP> window;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) window.ask(slice, i, i * STEP, c.lane);
#pragma unroll(WORDS ? STEPS : 1)
    for (int base = 0; base < STEPS; base += SLOTS) {
#pragma unroll
      for (int i = 0; i < SLOTS; ++i) {
        if (base + i >= TAKEN) continue;
        const int from = (base + i) * STEP;
        uint2 operands[STEP * SEAT_BLOCKS];
        window.take(slice, c.abort, i, c.lane, true, operands);
        if (base + (WORDS ? i : 0) + SLOTS < TAKEN) window.ask(slice, i, from + SLOTS * STEP, c.lane);
#pragma unroll
        for (int j = 0; j < STEP * SEAT_BLOCKS; ++j) keep(slice, from * SEAT_BLOCKS + j, operands[j]);
      }
    }
    __syncwarp();
  }
  __device__ __forceinline__ void take(Consumer&, S&, int, bool) {}
  __device__ __forceinline__ void ask(Consumer&, const S&, int, int) {}
  __device__ __forceinline__ SeatOperands at(int fragment, int) const {
    SeatOperands x;
#pragma unroll
    for (int block = 0; block < SEAT_BLOCKS; ++block) {
      const int number = fragment * SEAT_BLOCKS + block;
      if constexpr (WORDS) x.v[block] = kept[number];
      else x.v[block] = *reinterpret_cast<const uint2*>(scratch + number * OPERAND_BYTES);
    }
    return x;
  }

 private:
  __device__ __forceinline__ void keep(const S& slice, int number, uint2 operand) {
    if constexpr (!WORDS) {
      if (number < slice.count * SEAT_BLOCKS) *reinterpret_cast<uint2*>(scratch + number * OPERAND_BYTES) = operand;
    } else if (number < STEPS * STEP * SEAT_BLOCKS) kept[number] = operand;
  }
};

// Operands chunk by chunk, read again for every tile: the packets of the next chunks are under way while one is multiplied.
template <int COLUMNS, int FLAGS>
struct StreamedSeats {
  using S = SeatSlice<COLUMNS, FLAGS>;
  using P = Plan<COLUMNS, FLAGS>;
  static constexpr int SLOTS = steps_of(P::CHUNKS, STREAMED_IN_FLIGHT / (P::PER_CHUNK * SEAT_BLOCKS * S::PAIRS));
  static constexpr int CHUNKS_AT_ONCE = SLOTS, ROUNDS = 1;

  SeatWindow<COLUMNS, FLAGS, P::PER_CHUNK, SLOTS, P::CHUNKS * P::PER_CHUNK> window;
  uint2 operands[P::PER_CHUNK * SEAT_BLOCKS];

  __device__ __forceinline__ StreamedSeats(Consumer&) {}
  __device__ __forceinline__ void begin(Consumer& c, S& slice) {
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) window.ask(slice, i, i * P::PER_CHUNK, c.lane);
  }
  // The operands of the chunk that is multiplied next.
  __device__ __forceinline__ void take(Consumer& c, S& slice, int slot, bool count_squares) {
    window.take(slice, c.abort, slot % SLOTS, c.lane, count_squares, operands);
  }
  // The chunk has been multiplied: asks for the one that gets its registers.
  __device__ __forceinline__ void ask(Consumer& c, const S& slice, int slot, int chunk) {
    const int next = chunk + SLOTS;
    window.ask(slice, slot % SLOTS, (next < P::CHUNKS ? next : next - P::CHUNKS) * P::PER_CHUNK, c.lane);
  }
  __device__ __forceinline__ SeatOperands at(int, int j) const {
    SeatOperands x;
#pragma unroll
    for (int block = 0; block < SEAT_BLOCKS; ++block) x.v[block] = operands[j * SEAT_BLOCKS + block];
    return x;
  }
};

// Which of the two a product has.
template <int COLUMNS, int FLAGS, bool KEPT = (FLAGS & X_KEPT) || IN_REGISTERS<COLUMNS, FLAGS>>
struct SeatsOf {
  using Type = KeptSeats<COLUMNS, FLAGS>;
};
template <int COLUMNS, int FLAGS>
struct SeatsOf<COLUMNS, FLAGS, false> {
  using Type = StreamedSeats<COLUMNS, FLAGS>;
};

// Multiplies N chunks of a tile, from number `first` on, and takes chunks and packets that follow; `LAST`: the task has none beyond these N.
// Without looking at the ring for each, where all are known to have `LANDED`.
template <bool LAST, bool LANDED, int N, class P, class F, class X, class S>
__device__ __forceinline__ void multiply_group(Consumer& c, F& chunks, X& x, S& slice, SeatSums& sums, int first, bool count_squares) {
#pragma unroll
  for (int d = 0; d < N; ++d) {
    const int k = first + d, next = k + F::DEPTH;
    x.take(c, slice, d, count_squares);
    chunks.multiply_into(sums, d % F::DEPTH, k + 1 == P::CHUNKS, [&](int j) { return x.at(k * P::PER_CHUNK + j, j); });
    if (!LAST || d + X::CHUNKS_AT_ONCE < N) x.ask(c, slice, d, k);
    if (!LAST || d + F::DEPTH < N) chunks.fetch(c, d % F::DEPTH, next + 1 == P::CHUNKS || next + 1 == 2 * P::CHUNKS, LANDED);
  }
}

template <int COLUMNS, int FLAGS>
__device__ __forceinline__ void multiply_seats(Consumer& c, const MatVecTask& task, const Token& token) {
  using P = Plan<COLUMNS, FLAGS>;
  using S = SeatSlice<COLUMNS, FLAGS>;
  using X = typename SeatsOf<COLUMNS, FLAGS>::Type;
  using F = Fetched<P, CHUNKS_FETCHED>;
  constexpr int N = max_of(F::DEPTH, X::CHUNKS_AT_ONCE);  // chunks of a group
  static_assert(P::CHUNKS % N == 0 && N % F::DEPTH == 0 && N % X::CHUNKS_AT_ONCE == 0, "groups must fill a tile, and registers must come round with them");
  const int tiles = task.tiles;

  S slice(c.b, task, token, c.warp);
  slice.touch_gain(c.lane);
  F chunks(c.warp);
#pragma unroll
  for (int d = 0; d < F::DEPTH; ++d) chunks.fetch(c, d, d + 1 == P::CHUNKS);
  c.wait_released();
  X x(c);
  x.begin(c, slice);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    SeatSums sums;
    const bool slot_free = c.reduction_slot_free();
#pragma unroll(X::ROUNDS)
    for (int first = 0; first < P::CHUNKS; first += N) {
      const bool last = first + N == P::CHUNKS && tile + 1 == tiles;
      if (last) multiply_group<true, false, N, P>(c, chunks, x, slice, sums, first, tile == 0);
      else if (c.chunks_landed<N>()) multiply_group<false, true, N, P>(c, chunks, x, slice, sums, first, tile == 0);
      else multiply_group<false, false, N, P>(c, chunks, x, slice, sums, first, tile == 0);
    }
    if (tile == 0) slice.sum_squares();
    c.wait_reduction_slot(slot_free);
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
