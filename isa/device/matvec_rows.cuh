// Quantised tiles shared out among the consumer warps: each multiplies whole tiles, all of K, and publishes them itself.
//
// Where columns are shared out (matvec_quantised.cuh) a warp has a few products of every tile between two waits, and the storer adds up what eight
// warps have. Here every warp reads its slice of x and makes digits of it as there; then all meet, and each reads the slices of all. The storer is
// told of the task's end by one reduction slot.
//
// Tiles come in rounds, one for each warp, after which all meet: so a warp takes a chunk only when what lay in its stage before has landed and been
// taken, and digits are overwritten only when all have read them.
#pragma once
#include "isa/device/matvec.cuh"

constexpr int ROUND_TILES = min_of(CONSUMER_WARPS, STAGES);

// The row of a tile that a lane has, where it has one.
__device__ __forceinline__ int row_of(int lane) { return (lane >> 2) + 8 * (lane & 1); }

// What the others need of a warp's slice besides its digits, behind them in its scratch: what the lowest digit is worth, the sum of squares, and, where
// codes have zeros, each group's product with codes that are -1, as lanes with t = 0 and t = 1 have it.
template <int GROUPS>
struct SliceFacts {
  float down, squares;
  int sums[max_of(GROUPS, 1)][2];
};

template <class P>
struct SliceShare {
  static constexpr int GROUPS = P::PER_CHUNK * P::W::GROUPS, DIGIT_BYTES = ceil_div(DIGITS * plane_bytes(P::SLICE), 8) * 8;
  static constexpr int BYTES = SCRATCH_BYTES / CONSUMER_WARPS / 16 * 16;  // of all that a warp has there
  using Facts = SliceFacts<P::W::ASYMMETRIC ? GROUPS : 1>;
  // isa.gemv_glu_rows.rows_possible, where scratch is as large as GemvGluRows.shared_bytes asks.
  static constexpr bool POSSIBLE = P::W::BITS == 4 && P::W::GROUP != 0 && P::CHUNKS == 1 && P::HIGH_WARPS == 0 && DIGIT_BYTES + sizeof(Facts) <= BYTES;
};

// A piece of a tile as fetched: codes and what scales them.
template <class W>
struct PieceCodes {
  uint4 of[W::FRAGMENTS];
  GroupWords<W> group[max_of(W::GROUPS, 1)];  // shapes without groups are compiled no further, but must have a size

  // Returns words that depend on every load.
  __device__ __forceinline__ uint32_t fetch(const uint8_t* from, int lane) {
    uint32_t read = 0;
#pragma unroll
    for (int f = 0; f < W::FRAGMENTS; ++f) {
      of[f] = *reinterpret_cast<const uint4*>(from + f * FRAGMENT_BYTES + lane * 16);
      read |= of[f].x;
    }
    const uint8_t* scales = from + W::FRAGMENTS * FRAGMENT_BYTES;
#pragma unroll
    for (int g = 0; g < W::GROUPS; ++g)
      read |= group[g].read(scales + g * W::SCALES_BYTES, scales + W::GROUPS * W::SCALES_BYTES + g * W::ZEROS_BYTES, lane);
    return read;
  }
};

template <int COLUMNS, int FLAGS>
struct ByRows {
  using P = Plan<COLUMNS, FLAGS>;
  using Slice = ::Slice<COLUMNS, FLAGS>;
  using W = typename P::W;
  using Shape = ChunkShape<P>;
  using Codes = PieceCodes<W>;
  static constexpr int PLANE = plane_bytes(P::SLICE), FRAGMENT_STEPS = W::FRAGMENT / 32;
  using Share = SliceShare<P>;
  using Facts = typename Share::Facts;

  Consumer& c;
  const MatVecTask& task;
  uint8_t* scratch;  // of the first warp
  Codes first{};     // the first piece of the next tile
  uint32_t read = 0, stage = 0;

  __device__ __forceinline__ ByRows(Consumer& c, const MatVecTask& task) : c(c), task(task), scratch(reinterpret_cast<uint8_t*>(c.b.scratch())) {}

  __device__ __forceinline__ uint8_t* slice_of(int warp) const { return scratch + warp * Share::BYTES; }
  __device__ __forceinline__ const Facts& facts_of(int warp) const { return *reinterpret_cast<const Facts*>(slice_of(warp) + Share::DIGIT_BYTES); }
  // Where a lane's digits begin in a slice: those of its column of the product.
  __device__ __forceinline__ const uint8_t* digits_of(int warp) const {
    return slice_of(warp) + min_of(c.lane >> 2, DIGITS - 1) * PLANE + (c.lane & 3) * 8;
  }

  // x to digits, and what the others need beside them.
  __device__ __forceinline__ void convert(const Slice& slice, const Token& token, const float* gain) {
    FixedPointSlice<P, Slice> own;
    own.load(c, slice, c.b.buffer(task.x_buf) + task.x_start, token.expect(task.x_tag), gain, slice_of(c.warp));
    const float squares = Slice::NORMALISED ? warp_sum(own.squares) : 0.f;
    Facts& facts = *reinterpret_cast<Facts*>(slice_of(c.warp) + Share::DIGIT_BYTES);
    if (c.lane == 0) facts.down = own.down, facts.squares = squares;
    if constexpr (W::ASYMMETRIC) {
      __syncwarp();
      const uint8_t* digits = digits_of(c.warp);
#pragma unroll
      for (int g = 0; g < Share::GROUPS; ++g) {
        ByteSums sum;
#pragma unroll
        for (int i = 0; i < Shape::GROUP_STEPS; ++i)
          DigitOperands<P>::subtract(sum, *reinterpret_cast<const uint2*>(digits + (g * Shape::GROUP_STEPS + i) * 32));
        if (c.lane < 2) facts.sums[g][c.lane] = sum.low();
      }
    }
  }
  // Waits for the chunk that is `ahead` of the ring's next, and asks for its first piece.
  __device__ __forceinline__ void begin(uint32_t ahead) {
    const bool wraps = c.slot + ahead >= STAGES;
    stage = wraps ? c.slot + ahead - STAGES : c.slot + ahead;
    Barrier* full = &c.b.barriers().full[stage];
    const uint32_t parity = c.slot_parity ^ wraps;
    wait_until(c.abort, WAIT_FULL, [=] { return barrier_passed(full, parity); });
    read = first.fetch(c.b.stage(stage), c.lane);
  }
  // Rows g and g + 8 of a tile in what the lane's digits are worth, and x's sum of squares.
  struct Sums {
    float low = 0.f, high = 0.f, squares = 0.f;
  };
  __device__ __forceinline__ Sums multiply() {
    constexpr int PIECES = P::PER_CHUNK * CONSUMER_WARPS;
    const uint8_t* chunk = c.b.stage(stage);
    const uint8_t* digits = digits_of(0);
    const Facts* facts = &facts_of(0);
    Codes codes[2];
    codes[0] = first;
    Sums sums;
#pragma unroll(W::ASYMMETRIC ? 2 : 4)  // zeros take registers
    for (int w = 0; w < CONSUMER_WARPS; ++w) {
      float of_low = 0.f, of_high = 0.f;
      const float down = facts->down;
      if constexpr (Slice::NORMALISED) sums.squares += facts->squares;
#pragma unroll
      for (int j = 0; j < P::PER_CHUNK; ++j) {
        const int at = w * P::PER_CHUNK + j;
        Codes& now = codes[at & 1];
        if (at + 1 < PIECES) read |= codes[at & 1 ^ 1].fetch(chunk + (at + 1) * W::PIECE_BYTES, c.lane);
        ByteSums sum[W::GROUPS];
#pragma unroll
        for (int step = 0; step < Shape::STEPS; ++step) {
          const uint2 x = *reinterpret_cast<const uint2*>(digits + (j * Shape::STEPS + step) * 32);
          multiply_bytes(sum[step / Shape::GROUP_STEPS].d, nibbles_of(now.of[step / FRAGMENT_STEPS], step % FRAGMENT_STEPS), x);
        }
#pragma unroll
        for (int g = 0; g < W::GROUPS; ++g) {
          int low_sum = sum[g].low(), high_sum = sum[g].high();
          if constexpr (W::ASYMMETRIC) {
            const int minus_x = facts->sums[j * W::GROUPS + g][c.lane & 1];
            low_sum += now.group[g].low_zero() * minus_x;
            high_sum += now.group[g].high_zero() * minus_x;
          }
          of_low = fmaf(now.group[g].low_scale(), (float)low_sum, of_low);
          of_high = fmaf(now.group[g].high_scale(), (float)high_sum, of_high);
        }
      }
      sums.low = fmaf(of_low, down, sums.low);
      sums.high = fmaf(of_high, down, sums.high);
      digits += Share::BYTES;
      facts = reinterpret_cast<const Facts*>(reinterpret_cast<const uint8_t*>(facts) + Share::BYTES);
    }
    return sums;
  }
  // Frees the chunk for all consumers, as Consumer::release_chunk does for one.
  __device__ __forceinline__ void release() const {
    const bool none = __any_sync(~0u, (read & c.b.p.zero) != 0u);
    Barrier* empty = &c.b.barriers().empty[stage] + none;
    if constexpr (EVERY_LANE_ARRIVES) {
      for (int i = 0; i < CONSUMER_WARPS; ++i) barrier_arrive(empty);
    } else if (c.lane < CONSUMER_WARPS) {
      barrier_arrive(empty);
    }
  }
  // All tiles: see multiply_by_rows. What needs no x is worked out before x is waited for, and others wait for what is published: so that comes first.
  template <class Take>
  __device__ __forceinline__ void run(const Token& token, Take take) {
    const float* gain = c.b.constant(task.gain);
    const int tiles = task.tiles, row0 = (task.tile0 + c.warp) * TILE_ROWS + row_of(c.lane), rows = task.bias >= 0 ? task.rows : 0;
    const float* bias = c.b.constant(task.bias + row0);
    const float unit = TileSums<P>::unit(1.f, c.lane);
    Slice slice(c.warp);
    if constexpr (Slice::NORMALISED) slice.prefetch_gain(gain, c.lane);
    bool mine = c.warp < min_of(tiles, ROUND_TILES);
    if (mine) begin(c.warp);
    c.wait_released();
    convert(slice, token, gain);
    c.meet();
#pragma unroll 1
    for (int base = 0; base < tiles; base += ROUND_TILES) {
      if (base) {
        mine = c.warp < min_of(tiles - base, ROUND_TILES);
        if (mine) begin(c.warp);
      }
      if (mine) {
        const int row = base * TILE_ROWS;
        const float extra = row0 + row < rows ? __ldg(bias + row) : 0.f;
        const Sums sums = multiply();
        const float factor = Slice::NORMALISED ? rsqrtf(fmaf(sums.squares, 1.f / COLUMNS, RMS_EPS)) : 1.f;
        const bool second = c.lane & 1;
        const float own = (second ? sums.high : sums.low) * unit, other = (second ? sums.low : sums.high) * unit;
        take(base, fmaf(own + __shfl_xor_sync(~0u, other, 1), factor, extra));
        release();
      }
      const uint32_t to = c.slot + min_of(tiles - base, ROUND_TILES);
      c.slot_parity ^= to >= STAGES;
      c.slot = to >= STAGES ? to - STAGES : to;
      if (base + ROUND_TILES >= tiles) {
        c.wait_reduction_slot();
        c.fill_reduction_slot();
      }
      c.meet();
    }
  }
};

// A task's product, for every compiled shape that can be: take(base, y) with each of the warp's tiles, the (base + warp)-th of the task, where lanes 4g
// have row g and lanes 4g + 1 row g + 8, scaled and biased, and the other lanes nothing.
template <class Take>
__device__ __forceinline__ void multiply_by_rows(Consumer& c, const MatVecTask& task, const Token& token, Take take) {
  switch (task.shape) {
#define SHAPE_CASE(index, columns, flags) \
  case index: \
    if constexpr (SliceShare<Plan<columns, flags>>::POSSIBLE) ByRows<columns, flags>(c, task).run(token, take); \
    return;
    FOR_EACH_SHAPE(SHAPE_CASE)
#undef SHAPE_CASE
  }
}

// The storer's side: the task's one slot says that what the consumers published is out.
__device__ __forceinline__ void pass_slot(Storer& s) {
  Barriers& bars = s.b.barriers();
  Barrier* full = &bars.slot_full[s.red];
  const uint32_t parity = s.red_parity;
  wait_until(s.abort, WAIT_SLOT, [=] { return barrier_passed(full, parity); });
  __syncwarp();
  if (arrives(s.lane)) barrier_arrive(&bars.slot_free[s.red]);
  if (++s.red == REDUCTION_SLOTS) { s.red = 0; s.red_parity ^= 1; }
}
