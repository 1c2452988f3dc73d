// The streamed matrix-vector product: what consumers do for gemv, gemv_glu and gemv_head alike, and how their tiles are streamed.
//
// Each consumer warp owns a K slice: it reads that slice of x, keeps it as elements in its own part of scratch, and multiplies its fragments of
// every chunk. Nothing here is block-wide. Shapes are template arguments, so the loops have no run-time choice in them.
#pragma once
#include "isa/device/fetched.cuh"
#include "isa/device/matvec_quantised.cuh"

constexpr int KEPT_WORDS = 40;  // registers a lane may spend on its slice of x

// fp32 activations keep their precision: column 0 of the product takes x rounded to the element type, column 1 the rounding error. The
// tensor core multiplies 8 columns whether they are used or not.
template <int FLAGS>
constexpr bool TWO_COLUMNS = !WIDE && !(FLAGS & X_NARROW);

// A lane's part of x for one fragment: the B operand of a 16-bit product, or four fp32 columns.
struct Operand {
  static constexpr int WORDS = WIDE ? 4 : 2;
  uint32_t v[WORDS];
  static __device__ __forceinline__ int offset(int lane) { return WIDE ? (lane & 1) * 16 : (lane & 3) * 8; }
  __device__ __forceinline__ void read(const uint8_t* from) {
    if constexpr (WIDE) {
      const uint4 x = *reinterpret_cast<const uint4*>(from);
      v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
    } else {
      const uint2 x = *reinterpret_cast<const uint2*>(from);
      v[0] = x.x, v[1] = x.y;
    }
  }
};

// One warp's slice of x, read from packets, as elements in shared memory; returns this lane's sum of squares of what it read.
template <int COLUMNS, int FLAGS>
struct Slice {
  using P = Plan<COLUMNS, FLAGS>;
  static constexpr bool NORMALISED = FLAGS & X_NORM;
  static constexpr bool PAIRS = (FLAGS & X_NARROW) && !WIDE;      // packets of two elements
  static constexpr int STEP = PAIRS ? 128 : 64;                   // columns a warp reads with one load a lane (two packets)
  static constexpr int LOADS = ceil_div(P::SLICE, STEP);
  static constexpr int BATCH = min_of(LOADS, 8);
  // Every lane has columns in every load.
  static constexpr bool WHOLE = P::HIGH_WARPS == 0 && P::SLICE * CONSUMER_WARPS == COLUMNS && P::SLICE % STEP == 0;
  static constexpr bool GAIN_EARLY = (FLAGS & X_NORM) && LOADS <= 8;

  int first, count;        // columns [first, first + count)
  float2 gain[GAIN_EARLY ? LOADS : 1];

  __device__ Slice(int warp) {
    first = (warp * P::LOW + min_of(warp, P::HIGH_WARPS)) * P::W::COLUMNS;
    const int pieces = warp < P::HIGH_WARPS ? P::HIGH : P::LOW;
    count = max_of(0, min_of(pieces * P::W::COLUMNS, COLUMNS - first));
  }
  __device__ __forceinline__ int column(int load, int lane) const { return load * STEP + lane * (STEP / 32); }
  // The gains do not depend on x: asked for before the wait.
  __device__ __forceinline__ void prefetch_gain(const float* g, int lane) {
    if constexpr (GAIN_EARLY) {
#pragma unroll
      for (int i = 0; i < LOADS; ++i)
        gain[i] = column(i, lane) < count ? __ldg(reinterpret_cast<const float2*>(g + first + column(i, lane))) : make_float2(0.f, 0.f);
    }
  }
  __device__ __forceinline__ float2 gain_at(const float* g, int load, int at) const {
    if constexpr (GAIN_EARLY) return gain[load];
    return at < count ? __ldg(reinterpret_cast<const float2*>(g + first + at)) : make_float2(0.f, 0.f);
  }
  // Where a load reads. A lane without columns reads the last ones of the slice (of x, where the slice is empty): loads under no condition
  // are all in flight before the first is looked at.
  __device__ __forceinline__ int source(int load, int lane) const {
    constexpr int WIDTH = STEP / 32;
    if constexpr (WHOLE) return (first + column(load, lane)) * 2 / WIDTH;
    return count ? (first + min_of(column(load, lane), count - WIDTH)) * 2 / WIDTH : 0;
  }
  // `meanwhile` is done while the first packets are on their way.
  template <class Meanwhile>
  __device__ __forceinline__ float load(Consumer& c, const uint64_t* x, Expected want, const float* g, uint8_t* to, Meanwhile meanwhile) const {
    float squares = 0.f;
#pragma unroll
    for (int base = 0; base < LOADS; base += BATCH) {
      constexpr int N = BATCH;
      uint4 v[N];
      c.read_all(v, want, [&](int i) { return x + source(min_of(base + i, LOADS - 1), c.lane); }, [&] { if (base == 0) meanwhile(); });
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int at = column(base + i, c.lane);
        if (!WHOLE && at >= count) v[i] = make_uint4(0, 0, 0, 0);
        if (base + i < LOADS) squares += keep(v[i], g, base + i, at, to);
      }
    }
    return squares;
  }

 private:
  // Computed by every lane; one that is beyond the slice, and so has zeros, stores nothing.
  __device__ __forceinline__ float keep(const uint4& v, const float* g, int load, int at, uint8_t* to) const {
    const bool inside = P::SLICE % STEP == 0 || at < P::SLICE;
    if constexpr (PAIRS) {
      if (inside) *reinterpret_cast<uint2*>(to + at * 2) = make_uint2(v.x, v.z);
      return 0.f;
    }
    float a = as_float(v.x), b = as_float(v.z), squares = 0.f;
    if constexpr (FLAGS & X_NORM) {
      squares = a * a + b * b;
      const float2 gains = gain_at(g, load, at);
      a *= gains.x;
      b *= gains.y;
    }
    if constexpr (WIDE) {
      if (inside) *reinterpret_cast<float2*>(to + at * 4) = make_float2(a, b);
    } else {
      const uint32_t rounded = pack2(a, b), error = pack2(a - unpack_low(rounded), b - unpack_high(rounded));
      if (inside) *reinterpret_cast<uint32_t*>(to + at * 2) = rounded;
      if (inside) *reinterpret_cast<uint32_t*>(to + P::SLICE_BYTES + at * 2) = error;
    }
    return squares;
  }
};

// Partial sums of one tile: two rows a lane (g and g + 8) in the 16-bit product, one row a lane pair in fp32.
struct Sums {
  float acc[4][4];
  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] = 0.f;
  }
  // Adds fragment `a`, the j-th of its chunk, times `x`, the lane's part of the same columns.
  __device__ __forceinline__ void add(int j, const uint4& a, const Operand& x) {
    if constexpr (WIDE) {
      float& s = acc[j & 3][0];
      s = fmaf(as_float(a.x), as_float(x.v[0]), s);
      s = fmaf(as_float(a.y), as_float(x.v[1]), s);
      s = fmaf(as_float(a.z), as_float(x.v[2]), s);
      s = fmaf(as_float(a.w), as_float(x.v[3]), s);
    } else {
      multiply(acc[j & 3], a, x.v[0], x.v[1]);
    }
  }
  // The rows' sums over this warp's K slice; `two`: column 1 holds the product with the rounding errors.
  __device__ __forceinline__ void store(float* part, int lane, bool two) {
    if constexpr (WIDE) {
      float v = (acc[0][0] + acc[1][0]) + (acc[2][0] + acc[3][0]);
      v += __shfl_xor_sync(~0u, v, 1);
      if (!(lane & 1)) part[lane >> 1] = v;
    } else if ((lane & 3) == 0) {
      float low = (acc[0][0] + acc[1][0]) + (acc[2][0] + acc[3][0]), high = (acc[0][2] + acc[1][2]) + (acc[2][2] + acc[3][2]);
      if (two) {
        low += (acc[0][1] + acc[1][1]) + (acc[2][1] + acc[3][1]);
        high += (acc[0][3] + acc[1][3]) + (acc[2][3] + acc[3][3]);
      }
      part[lane >> 2] = low;
      part[8 + (lane >> 2)] = high;
    }
  }
};

// Where the operands of a slice's fragments come from: registers, where the whole slice fits into some, or scratch.
template <class P, bool TWO>
struct Operands {
  static constexpr bool KEPT = P::HIGH * Operand::WORDS <= KEPT_WORDS;
  const uint8_t* from;
  Operand kept[KEPT ? P::CHUNKS * P::PER_CHUNK : 1];  // those beyond the slice are never used

  // Where a lane's operands begin in a slice; lanes 4 to 7 hold column 1.
  static __device__ __forceinline__ int offset(int lane) { return (TWO && lane >> 2 == 1 ? P::SLICE_BYTES : 0) + Operand::offset(lane); }
  // After the warp has written its slice, `own` being where this lane's operands of it begin.
  __device__ __forceinline__ void begin(const uint8_t* own) {
    from = own;
    if constexpr (KEPT) {
#pragma unroll
      for (int i = 0; i < P::HIGH; ++i) kept[i].read(from + i * FRAGMENT_COLUMNS * ELEMENT_BYTES);
    }
  }
  __device__ __forceinline__ Operand at(int fragment) const {
    if constexpr (KEPT) return kept[fragment];
    Operand x;
    x.read(from + fragment * FRAGMENT_COLUMNS * ELEMENT_BYTES);
    return x;
  }
};

template <int COLUMNS, int FLAGS>
__device__ __forceinline__ void multiply_tiles(Consumer& c, const MatVecTask& task, const Token& token) {
  using P = Plan<COLUMNS, FLAGS>;
  const Block& b = c.b;
  const uint64_t* x = b.buffer(task.x_buf) + task.x_start;
  const float* gain = b.constant(task.gain);
  constexpr bool TWO = TWO_COLUMNS<FLAGS>;
  // The same place for every shape: another consumer may still be at an earlier task of another shape.
  constexpr int OWN_BYTES = SCRATCH_BYTES / CONSUMER_WARPS / 16 * 16;
  constexpr int X_BYTES = P::W::QUANTISED ? DIGITS * plane_bytes(P::SLICE) : P::SLICE_BYTES * (TWO ? 2 : 1);
  static_assert(X_BYTES <= OWN_BYTES, "a consumer's share of scratch must hold its slice of x");
  uint8_t* slice_bytes = reinterpret_cast<uint8_t*>(b.scratch()) + c.warp * OWN_BYTES;
  using F = Fetched<P, Slice<COLUMNS, FLAGS>::LOADS <= 4 ? 4 : 2>;
  if constexpr (P::W::QUANTISED) {
    multiply_quantised_tiles<P, Slice<COLUMNS, FLAGS>, F::DEPTH>(c, task, x, token.expect(task.x_tag), gain, slice_bytes);
    return;
  }
  const int tiles = task.tiles;

  Slice<COLUMNS, FLAGS> slice(c.warp);
  if constexpr (FLAGS & X_NORM) slice.prefetch_gain(gain, c.lane);
  F chunks(c.warp);
#pragma unroll
  for (int d = 0; d < F::DEPTH; ++d) chunks.fetch(c, d, d + 1 == P::CHUNKS);
  using O = Operands<P, TWO>;
  const int own = opaque(O::offset(c.lane));
  c.wait_released();
  bool slot_free = false, landed = false;
  float squares = slice.load(c, x, token.expect(task.x_tag), gain, slice_bytes, [&] {
    slot_free = c.reduction_slot_free();
    landed = c.each_landed<F::DEPTH>();
  });
  __syncwarp();
  // Where a tile has one chunk, its products would wait for this sum at their end; else they come first, so that chunks are taken earlier.
  constexpr bool SUM_LATER = P::CHUNKS > 1;
  if constexpr ((FLAGS & X_NORM) && !SUM_LATER) squares = warp_sum(squares);
  O operands;
  operands.begin(slice_bytes + own);

#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    Sums sums;
    if (tile) slot_free = c.reduction_slot_free();
    multiply_tile<P>(c, chunks, operands, sums, tile + 1 == tiles, tile == 0, landed);
    if ((FLAGS & X_NORM) && SUM_LATER && tile == 0) squares = warp_sum(squares);
    float* part = c.wait_reduction_slot(slot_free);
    sums.store(part, c.lane, TWO);
    if ((FLAGS & X_NORM) && c.lane == 1) part[TILE_ROWS] = squares;
    c.fill_reduction_slot();
  }
}

// The storer's side of a tile: rows summed over the warps, times the factor of RMS normalisation, which is the same for every tile of a task.
struct ScaledRows {
  const bool normalised;
  const float inverse_columns;
  float scale = 1.f;

  __device__ __forceinline__ ScaledRows(int flags, int columns) : normalised(flags & X_NORM), inverse_columns(1.f / (float)columns) {}
  // Lanes r and r + 16 get row r of the tile, times the factor, plus `extra`.
  __device__ __forceinline__ float next(Storer& s, int tile, float extra) {
    const bool first = normalised && tile == 0;
    float squares = 0.f;
    const float sum = s.reduce(first, squares);
    if (first) scale = rsqrtf(fmaf(squares, inverse_columns, RMS_EPS));
    return fmaf(sum, scale, extra);
  }
};

// Every compiled shape: X(index, columns, flags).
__device__ __forceinline__ void consume_matvec(Consumer& c, const MatVecTask& task, const Token& token) {
  switch (task.shape) {
#define SHAPE_CASE(index, columns, flags) \
  case index: multiply_tiles<columns, flags>(c, task, token); return;
    FOR_EACH_SHAPE(SHAPE_CASE)
#undef SHAPE_CASE
  }
}
__device__ __forceinline__ bool stream_matvec(Feeder& f, const MatVecTask& task, const uint8_t*& at, const Token&) {
  switch (task.shape) {
#define SHAPE_CASE(index, columns, flags) \
  case index: return stream_tiles<columns, flags>(f, at, task.tiles);
    FOR_EACH_SHAPE(SHAPE_CASE)
#undef SHAPE_CASE
  }
  return true;
}
