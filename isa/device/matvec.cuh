// The streamed matrix-vector product: what consumers do for gemv, gemv_glu and gemv_head alike, and how their tiles are streamed.
//
// Each consumer warp owns a K slice: it reads that slice of x, keeps it as elements in its own part of scratch, and multiplies its fragments of
// every chunk. Nothing here is block-wide. Shapes are template arguments, so the loops have no run-time choice in them.
#pragma once
#include "isa/device/block.cuh"

constexpr int X_NARROW = 1, X_NORM = 2;

// How a tile of 16 rows by COLUMNS is cut into chunks and shared among the warps: isa.machine.chunk_plan, at compile time.
template <int COLUMNS>
struct Plan {
  static constexpr int FRAGMENTS = ceil_div(COLUMNS, FRAGMENT_COLUMNS);
  static constexpr int LOW = FRAGMENTS / CONSUMER_WARPS, HIGH_WARPS = FRAGMENTS % CONSUMER_WARPS, HIGH = LOW + (HIGH_WARPS > 0);
  static constexpr int FIT = STAGE_BYTES / (FRAGMENT_BYTES * CONSUMER_WARPS);
  static constexpr int PER_CHUNK = ceil_div(HIGH, ceil_div(HIGH, FIT));
  static constexpr int CHUNKS = ceil_div(HIGH, PER_CHUNK);
  static constexpr int LAST_HIGH = HIGH - (CHUNKS - 1) * PER_CHUNK, LAST_LOW = LOW - (CHUNKS - 1) * PER_CHUNK;
  static constexpr int FULL_BYTES = PER_CHUNK * CONSUMER_WARPS * FRAGMENT_BYTES;
  static constexpr int LAST_BYTES = (LAST_LOW * CONSUMER_WARPS + HIGH_WARPS) * FRAGMENT_BYTES;
  static constexpr int SLICE = HIGH * FRAGMENT_COLUMNS;  // elements of x a warp keeps, at most
  static constexpr int SLICE_BYTES = SLICE * ELEMENT_BYTES;
};

// fp32 activations keep their precision: column 0 of the product takes x rounded to the element type, column 1 the rounding error. The
// tensor core multiplies 8 columns whether they are used or not.
template <int FLAGS>
constexpr bool TWO_COLUMNS = !WIDE && !(FLAGS & X_NARROW);

template <int COLUMNS>
__device__ __forceinline__ bool stream_tiles(Feeder& f, const uint8_t*& at, int tiles) {
  using P = Plan<COLUMNS>;
  for (int tile = 0; tile < tiles; ++tile)
#pragma unroll 1
    for (int c = 0; c < P::CHUNKS; ++c) {
      const uint32_t bytes = c + 1 < P::CHUNKS ? P::FULL_BYTES : P::LAST_BYTES;
      if (!f.stream(at, bytes)) return false;
      at += bytes;
    }
  return true;
}

// One warp's slice of x, read from packets, as elements in shared memory; returns this lane's sum of squares of what it read.
template <int COLUMNS, int FLAGS>
struct Slice {
  using P = Plan<COLUMNS>;
  static constexpr bool PAIRS = (FLAGS & X_NARROW) && !WIDE;      // packets of two elements
  static constexpr int STEP = PAIRS ? 128 : 64;                   // columns a warp reads with one load a lane (two packets)
  static constexpr int LOADS = ceil_div(P::SLICE, STEP);
  static constexpr int BATCH = min_of(LOADS, 8);
  static constexpr bool GAIN_EARLY = (FLAGS & X_NORM) && LOADS <= 8;

  int first, count;        // columns [first, first + count)
  float2 gain[GAIN_EARLY ? LOADS : 1];

  __device__ Slice(int warp) {
    first = (warp * P::LOW + min_of(warp, P::HIGH_WARPS)) * FRAGMENT_COLUMNS;
    const int fragments = warp < P::HIGH_WARPS ? P::HIGH : P::LOW;
    count = max_of(0, min_of(fragments * FRAGMENT_COLUMNS, COLUMNS - first));
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
  __device__ __forceinline__ float load(Consumer& c, const uint64_t* x, Expected want, const float* g, uint8_t* to) const {
    const uint64_t* from = x + first / (PAIRS ? 2 : 1) + c.lane * 2;
    float squares = 0.f;
#pragma unroll
    for (int base = 0; base < LOADS; base += BATCH) {
      uint4 v[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (base + i < LOADS && column(base + i, c.lane) < count) v[i] = load_packets(from + (base + i) * 64);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        if (base + i >= LOADS) continue;
        const int at = column(base + i, c.lane);
        if (at < count) c.settle(v[i], from + (base + i) * 64, want);
        else v[i] = make_uint4(0, 0, 0, 0);
        if (at < P::SLICE) squares += keep(v[i], g, base + i, at, to);
      }
    }
    return squares;
  }

 private:
  __device__ __forceinline__ float keep(const uint4& v, const float* g, int load, int at, uint8_t* to) const {
    if constexpr (PAIRS) {
      *reinterpret_cast<uint2*>(to + at * 2) = make_uint2(v.x, v.z);
      return 0.f;
    }
    float a = as_float(v.x), b = as_float(v.z), squares = 0.f;
    if constexpr (FLAGS & X_NORM) {
      squares = a * a + b * b;
      float2 gains = make_float2(0.f, 0.f);
      if constexpr (GAIN_EARLY) gains = gain[load];
      else if (at < count) gains = __ldg(reinterpret_cast<const float2*>(g + first + at));
      a *= gains.x;
      b *= gains.y;
    }
    if constexpr (WIDE) *reinterpret_cast<float2*>(to + at * 4) = make_float2(a, b);
    else {
      const uint32_t rounded = pack2(a, b);
      *reinterpret_cast<uint32_t*>(to + at * 2) = rounded;
      *reinterpret_cast<uint32_t*>(to + P::SLICE_BYTES + at * 2) = pack2(a - unpack_low(rounded), b - unpack_high(rounded));
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
  // `from`: N fragments of this lane in shared memory; `x`: the slice at the first of them. Fragments from `count` on are left out.
  template <int N>
  __device__ __forceinline__ void add(Consumer& c, const uint8_t* from, const uint8_t* x, int count) {
    uint4 a[N];
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < count) a[j] = *reinterpret_cast<const uint4*>(from + j * FRAGMENT_BYTES + c.lane * 16);
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < count) add_one(j, a[j], x + j * FRAGMENT_COLUMNS * ELEMENT_BYTES, c.lane);
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

 private:
  __device__ __forceinline__ void add_one(int j, const uint4& a, const uint8_t* x, int lane) {
    if constexpr (WIDE) {
      const float4 b = *reinterpret_cast<const float4*>(x + (lane & 1) * 16);
      float& s = acc[j & 3][0];
      s = fmaf(as_float(a.x), b.x, s);
      s = fmaf(as_float(a.y), b.y, s);
      s = fmaf(as_float(a.z), b.z, s);
      s = fmaf(as_float(a.w), b.w, s);
    } else {
      const uint2 b = *reinterpret_cast<const uint2*>(x + (lane & 3) * 8);
      multiply(acc[j & 3], a, b.x, b.y);
    }
  }
};

template <int COLUMNS, int FLAGS>
__device__ __forceinline__ void multiply_tiles(Consumer& c, const MatVecTask& task, const Token& token) {
  using P = Plan<COLUMNS>;
  const Block& b = c.b;
  const uint64_t* x = b.buffer(task.x_buf) + task.x_start;
  const float* gain = b.constant(task.gain);
  constexpr bool TWO = TWO_COLUMNS<FLAGS>;
  // The same place for every shape: another consumer may still be at an earlier task of another shape.
  constexpr int OWN_BYTES = SCRATCH_BYTES / CONSUMER_WARPS / 16 * 16;
  static_assert(P::SLICE_BYTES * (TWO ? 2 : 1) <= OWN_BYTES, "a consumer's share of scratch must hold its slice of x");
  uint8_t* kept = reinterpret_cast<uint8_t*>(b.scratch()) + c.warp * OWN_BYTES;
  const bool high = c.warp < P::HIGH_WARPS;
  const int tiles = task.tiles;

  Slice<COLUMNS, FLAGS> slice(c.warp);
  if constexpr (FLAGS & X_NORM) slice.prefetch_gain(gain, c.lane);
  c.wait_released();
  float squares = slice.load(c, x, token.expect(task.x_tag), gain, kept);
  __syncwarp();
  if constexpr (FLAGS & X_NORM) squares = warp_sum(squares);

  const uint8_t* mine = kept + (TWO && c.lane >> 2 == 1 ? P::SLICE_BYTES : 0);  // lanes 4 to 7 hold column 1
  const int last = high ? P::LAST_HIGH : P::LAST_LOW;
  const int warp_last = (c.warp * P::LAST_LOW + min_of(c.warp, P::HIGH_WARPS)) * FRAGMENT_BYTES;
  constexpr int KEPT_CHUNK = P::PER_CHUNK * FRAGMENT_COLUMNS * ELEMENT_BYTES;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    Sums sums;
#pragma unroll UNROLL
    for (int k = 0; k + 1 < P::CHUNKS; ++k) {
      const uint8_t* chunk = c.wait_chunk() + c.warp * P::PER_CHUNK * FRAGMENT_BYTES;
      sums.template add<P::PER_CHUNK>(c, chunk, mine + k * KEPT_CHUNK, P::PER_CHUNK);
      c.release_chunk();
    }
    const uint8_t* chunk = c.wait_chunk() + warp_last;
    sums.template add<P::LAST_HIGH>(c, chunk, mine + (P::CHUNKS - 1) * KEPT_CHUNK, P::HIGH_WARPS ? last : P::LAST_HIGH);
    c.release_chunk();
    float* part = c.wait_reduction_slot();
    sums.store(part, c.lane, TWO);
    if ((FLAGS & X_NORM) && c.lane == 1) part[TILE_ROWS] = squares;
    c.fill_reduction_slot();
  }
}

// The factor that RMS normalisation puts on the product: 1 where x is not normalised.
__device__ __forceinline__ float norm_scale(int flags, int columns, float squares) {
  return flags & X_NORM ? rsqrtf(squares / (float)columns + RMS_EPS) : 1.f;
}

// Every compiled shape: X(index, columns, flags).
__device__ __forceinline__ void consume_matvec(Consumer& c, const MatVecTask& task, const Token& token) {
  switch (task.shape) {
#define SHAPE_CASE(index, columns, flags) \
  case index: multiply_tiles<columns, flags>(c, task, token); return;
    FOR_EACH_SHAPE(SHAPE_CASE)
#undef SHAPE_CASE
  }
}
__device__ __forceinline__ bool stream_matvec(Feeder& f, const MatVecTask& task, const uint8_t*& at) {
  switch (task.shape) {
#define SHAPE_CASE(index, columns, flags) \
  case index: return stream_tiles<columns>(f, at, task.tiles);
    FOR_EACH_SHAPE(SHAPE_CASE)
#undef SHAPE_CASE
  }
  return true;
}
