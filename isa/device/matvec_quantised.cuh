// Quantised weights times x in integers: codes and x's digits are signed bytes, the products of a group are summed exactly, then scaled in fp32.
//
// Columns 0 to 2 of the product take the digits of x, from the most significant. A lane (g = lane / 4, t = lane % 4) holds rows g and g + 8 of two
// columns: t = 0 the upper two digits; t = 1 the lowest twice, as column 3 takes it too. Both make one number of them, 256 times the first plus
// the second; what that is worth, the lane knows. vm.quantised_image has the order of codes in a fragment.
#pragma once
#include "isa/device/fixed_point.cuh"

#if TURING || __CUDA_ARCH__ < 800
// A quarter of the product below: 8 of its rows, 16 of its columns. Compute capability 7.5 has no larger one.
__device__ __forceinline__ void multiply_quarter(int& d0, int& d1, uint32_t a, uint32_t b) {
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1},{%2},{%3},{%0,%1};" : "+r"(d0), "+r"(d1) : "r"(a), "r"(b));
}
#endif

// d[16 rows x 8 columns] += a[16 x 32] * b[32 x 8] of signed bytes; a lane holds d as in `multiply`.
__device__ __forceinline__ void multiply_bytes(int (&d)[4], const uint4& a, uint2 b) {
#if TURING || __CUDA_ARCH__ < 800
  multiply_quarter(d[0], d[1], a.x, b.x);
  multiply_quarter(d[2], d[3], a.y, b.x);
  multiply_quarter(d[0], d[1], a.z, b.y);
  multiply_quarter(d[2], d[3], a.w, b.y);
#else
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
#endif
}

// Codes of 4 bits as the product takes them, 32 columns of a fragment: each in the upper half of a byte, so times 16.
__device__ __forceinline__ uint4 nibbles_of(const uint4& codes, int step) {
  const uint32_t low = step ? codes.z : codes.x, high = step ? codes.w : codes.y;
  constexpr uint32_t UPPER = 0xF0F0F0F0u;
  return make_uint4(low << 4 & UPPER, high << 4 & UPPER, low & UPPER, high & UPPER);
}
// Computed where it is written, not where it is used.
__device__ __forceinline__ uint4 here(uint4 v) {
  asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
  return v;
}
template <class W>
constexpr float CODE_UNIT = W::BITS == 4 ? 1.f / 16 : 1.f;

// Scale and zero of a lane's two rows, g and g + 8, in one group, as the stream has them: both rows in one word.
template <class W>
struct GroupWords {
  uint32_t scales, zeros;  // zeros are bytes as those of codes

  // `scales` are the group's 16 (row g next to row g + 8), `zeros` likewise. Returns what it has read.
  __device__ __forceinline__ uint32_t read(const uint8_t* from_scales, const uint8_t* from_zeros, int lane) {
    scales = *reinterpret_cast<const uint32_t*>(from_scales + (lane >> 2) * 4);
    if constexpr (!W::ASYMMETRIC) return scales;
    zeros = *reinterpret_cast<const uint16_t*>(from_zeros + (lane >> 2) * 2);
    return scales | zeros;
  }
  __device__ __forceinline__ float low_scale() const { return W::FP16_SCALE ? unpack_fp16(scales & 0xFFFF) : as_float(scales << 16); }
  __device__ __forceinline__ float high_scale() const { return W::FP16_SCALE ? unpack_fp16(scales >> 16) : as_float(scales & 0xFFFF0000u); }
  __device__ __forceinline__ int low_zero() const { return signed_byte<0x8880>(); }
  __device__ __forceinline__ int high_zero() const { return signed_byte<0x9991>(); }

 private:
  // `SELECTOR` puts a byte of the zeros lowest, its sign above.
  template <int SELECTOR>
  __device__ __forceinline__ int signed_byte() const {
    int v;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(v) : "r"(zeros), "n"(SELECTOR));
    return v;
  }
  static __device__ __forceinline__ float unpack_fp16(uint32_t half) {
    float f;
    asm("{\n.reg .b16 h, unused;\nmov.b32 {h, unused}, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(f) : "r"(half));
    return f;
  }
};

// A sum of products of bytes, columns 2t and 2t + 1 of rows g and g + 8.
struct ByteSums {
  int d[4] = {};
  // Both columns as one number; of up to 128 products of bytes, a digit of the most significant column being at most 64: no overflow.
  __device__ __forceinline__ int low() const { return d[0] * 256 + d[1]; }
  __device__ __forceinline__ int high() const { return d[2] * 256 + d[3]; }
};

// How a warp's part of a chunk is multiplied: pieces of `STEPS` products of 32 columns, `SUMS` sums that are scaled alone (of a row's one, in
// CHAINS parts that do not wait for each other).
template <class P>
struct ChunkShape {
  using W = typename P::W;
  static constexpr int CHAINS = 4;
  static constexpr int STEPS = W::COLUMNS / 32, GROUP_STEPS = W::GROUP ? W::GROUP / 32 : P::SLICE / 32;
  static constexpr int SUMS = W::GROUP ? P::PER_CHUNK * W::GROUPS : CHAINS, SCALES = W::GROUP ? SUMS : 1;
  // Which sum takes a step of the j-th piece.
  static __device__ __forceinline__ constexpr int sum_of(int j, int step) {
    return W::GROUP ? j * W::GROUPS + step / GROUP_STEPS : (j * STEPS + step) % CHAINS;
  }
};

// A warp's slice of x as operands, 32 columns a step: in registers, where it fits into some, or in scratch.
template <class P>
struct DigitOperands {
  using W = typename P::W;
  using Shape = ChunkShape<P>;
  static constexpr int PLANE = plane_bytes(P::SLICE), STEPS = P::SLICE / 32, GROUPS = ceil_div(STEPS, Shape::GROUP_STEPS);
  static constexpr bool KEPT = 2 * STEPS + (W::ASYMMETRIC ? GROUPS : 0) <= 40;
  static constexpr bool SUMMED = W::ASYMMETRIC && (KEPT || !W::GROUP);  // the groups' sums of x are kept too
  const uint8_t* from;
  uint2 kept[KEPT ? P::CHUNKS * P::PER_CHUNK * Shape::STEPS : 1] = {};
  int sums[W::GROUP ? P::CHUNKS * Shape::SUMS : 1] = {};  // the product with codes that are -1, as a number of both columns
  float row_sum = 0.f;

  // After the warp has written its slice.
  __device__ __forceinline__ void begin(const uint8_t* slice, int lane) {
    from = slice + min_of(lane >> 2, DIGITS - 1) * PLANE + (lane & 3) * 8;
    if constexpr (KEPT) {
#pragma unroll
      for (int i = 0; i < STEPS; ++i) kept[i] = *reinterpret_cast<const uint2*>(from + i * 32);
    }
    if constexpr (SUMMED) {
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        ByteSums sum;
#pragma unroll(KEPT ? STEPS : 4)
        for (int i = 0; i < Shape::GROUP_STEPS; ++i) subtract(sum, at(group * Shape::GROUP_STEPS + i));
        if constexpr (W::GROUP) sums[group] = sum.low();
        else row_sum = fmaf(256.f, (float)sum.d[0], (float)sum.d[1]);
      }
    }
  }
  __device__ __forceinline__ uint2 at(int step) const {
    if constexpr (KEPT) return kept[step];
    return *reinterpret_cast<const uint2*>(from + step * 32);
  }
  static __device__ __forceinline__ void subtract(ByteSums& sum, uint2 x) {
    multiply_bytes(sum.d, make_uint4(~0u, ~0u, ~0u, ~0u), x);
  }
};

// Scales and zeros of a chunk.
template <class P>
struct ChunkWords {
  GroupWords<typename P::W> group[ChunkShape<P>::SCALES];
};

// A lane's partial sums of one tile, rows g and g + 8, in its unit. Products are scaled after the next chunk has been asked for: they take long.
template <class P>
struct TileSums {
  using W = typename P::W;
  using X = DigitOperands<P>;
  using Shape = ChunkShape<P>;
  static constexpr bool SUM_X = W::ASYMMETRIC && !X::SUMMED;
  float low = 0.f, high = 0.f;
  ByteSums sum[Shape::SUMS];
  ByteSums less_x[SUM_X ? Shape::SUMS : 1];  // the product with codes that are -1

  __device__ __forceinline__ void begin_chunk() {
    if constexpr (W::GROUP) {
#pragma unroll
      for (int i = 0; i < Shape::SUMS; ++i) sum[i] = ByteSums();
      if constexpr (SUM_X)
#pragma unroll
        for (int i = 0; i < Shape::SUMS; ++i) less_x[i] = ByteSums();
    }
  }
  // Adds the j-th of the chunk's pieces, which begins at step `first` of x.
  __device__ __forceinline__ void add(int j, const uint4 (&bytes)[Shape::STEPS], const X& x, int first) {
#pragma unroll
    for (int step = 0; step < Shape::STEPS; ++step) {
      const uint2 b = x.at(first + step);
      multiply_bytes(sum[Shape::sum_of(j, step)].d, bytes[step], b);
      if constexpr (SUM_X) X::subtract(less_x[Shape::sum_of(j, step)], b);
    }
  }
  __device__ __forceinline__ void scale_groups(const ChunkWords<P>& words, const X& x, int chunk) {
#pragma unroll
    for (int i = 0; i < Shape::SUMS; ++i) {
      const GroupWords<W>& group = words.group[i];
      int low_sum = sum[i].low(), high_sum = sum[i].high();
      if constexpr (W::ASYMMETRIC) {
        const int minus_x = SUM_X ? less_x[SUM_X ? i : 0].low() : x.sums[chunk * Shape::SUMS + i];
        low_sum += group.low_zero() * minus_x;
        high_sum += group.high_zero() * minus_x;
      }
      low = fmaf(group.low_scale(), (float)low_sum, low);
      high = fmaf(group.high_scale(), (float)high_sum, high);
    }
  }
  __device__ __forceinline__ void scale_row(const ChunkWords<P>& words, const X& x) {
    const GroupWords<W>& group = words.group[0];
    float d[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = (float)(sum[0].d[i] + sum[1].d[i] + (sum[2].d[i] + sum[3].d[i]));
    low = fmaf(256.f, d[0], d[1]);
    high = fmaf(256.f, d[2], d[3]);
    if constexpr (W::ASYMMETRIC) {
      low = fmaf((float)group.low_zero(), x.row_sum, low);
      high = fmaf((float)group.high_zero(), x.row_sum, high);
    }
    low *= group.low_scale();
    high *= group.high_scale();
  }
  // The tile's rows, from the lanes that hold the digits: lane 4g stores row g, lane 4g + 1 row g + 8.
  __device__ __forceinline__ void store(float* part, int lane, float unit) const {
    const bool second = lane & 1;
    const float own = (second ? high : low) * unit, other = (second ? low : high) * unit;
    const float sum = own + __shfl_xor_sync(~0u, other, 1);
    if (!(lane & 2)) part[(lane >> 2) + 8 * second] = sum;
  }
  // What `low` and `high` of a lane are worth, `down` being the lowest digit's worth.
  static __device__ __forceinline__ float unit(float down, int lane) {
    return down * CODE_UNIT<W> * (lane & 3 ? 1.f / 257 : 256.f);
  }
};

// Codes of the next chunks that are this warp's, in registers, as Fetched has fragments of elements; the first are bytes before x is there.
template <class P, int DEPTH>
struct FetchedCodes {
  using W = typename P::W;
  using Shape = ChunkShape<P>;
  static constexpr int FRAGMENT_STEPS = W::FRAGMENT / 32;
  static constexpr bool UNIFORM = P::HIGH_WARPS == 0 && P::LAST_HIGH == P::PER_CHUNK;  // the last chunk of a tile is as the others
  static constexpr bool AS_THEY_ARE = W::BITS == 8;  // codes are the product's bytes
  uint4 codes[AS_THEY_ARE ? 1 : P::PER_CHUNK][W::FRAGMENTS];  // as fetched last
  uint4 bytes[DEPTH][P::PER_CHUNK][Shape::STEPS];
  ChunkWords<P> words[DEPTH];
  const int last, last_at;  // pieces of this warp in the last chunk of a tile, and where they begin

  __device__ __forceinline__ FetchedCodes(int warp)
      : last(warp < P::HIGH_WARPS ? P::LAST_HIGH : P::LAST_LOW),
        last_at((warp * P::LAST_LOW + min_of(warp, P::HIGH_WARPS)) * W::PIECE_BYTES) {}
  __device__ __forceinline__ bool has(int j, bool is_last) const { return UNIFORM || !is_last || j < last; }
  // Waits for the next chunk in the ring, reads it and frees its slot.
  __device__ __forceinline__ void fetch(Consumer& c, int slot, bool is_last) {
    const uint8_t* chunk = c.wait_chunk();
    const uint8_t* from = chunk + (!UNIFORM && is_last ? last_at : c.warp * P::PER_CHUNK * W::PIECE_BYTES);
    uint32_t read = 0;
#pragma unroll
    for (int j = 0; j < P::PER_CHUNK; ++j) read |= fetch_piece(slot, j, from + j * W::PIECE_BYTES, has(j, is_last), c.lane);
    if constexpr (!W::GROUP) {
      const uint8_t* tail = chunk + (!UNIFORM && is_last ? P::LAST_BYTES : P::FULL_BYTES) - W::TAIL_BYTES;
      read |= words[slot].group[0].read(tail, tail + W::SCALES_BYTES, c.lane);
    }
    c.release_chunk(read);
  }
  // There is no next chunk. Codes that a path leaves as they were would be kept until they are decoded again.
  __device__ __forceinline__ void forget() {
    if constexpr (AS_THEY_ARE) return;
#pragma unroll
    for (int j = 0; j < P::PER_CHUNK; ++j)
#pragma unroll
      for (int f = 0; f < W::FRAGMENTS; ++f) codes[j][f] = {};
  }
  __device__ __forceinline__ void decode(int slot) {
    if constexpr (AS_THEY_ARE) return;
#pragma unroll
    for (int j = 0; j < P::PER_CHUNK; ++j)
#pragma unroll
      for (int step = 0; step < Shape::STEPS; ++step)
        bytes[slot][j][step] = here(nibbles_of(codes[j][step / FRAGMENT_STEPS], step % FRAGMENT_STEPS));
  }
  __device__ __forceinline__ void multiply_into(TileSums<P>& sums, int slot, bool is_last, const DigitOperands<P>& x, int chunk) const {
    sums.begin_chunk();
#pragma unroll
    for (int j = 0; j < P::PER_CHUNK; ++j)
      if (has(j, is_last)) sums.add(j, bytes[slot][j], x, (chunk * P::PER_CHUNK + j) * Shape::STEPS);
  }

 private:
  // Returns words that depend on every load.
  __device__ __forceinline__ uint32_t fetch_piece(int slot, int j, const uint8_t* from, bool has_it, int lane) {
    uint32_t read = 0;
#pragma unroll
    for (int f = 0; f < W::FRAGMENTS; ++f) {
      uint4& to = AS_THEY_ARE ? bytes[slot][j][f] : codes[j][f];
      to = has_it ? *reinterpret_cast<const uint4*>(from + f * FRAGMENT_BYTES + lane * 16) : uint4{};
      read |= to.x;
    }
    const uint8_t* scales = from + W::FRAGMENTS * FRAGMENT_BYTES;
#pragma unroll
    for (int g = 0; g < W::GROUPS; ++g) {
      GroupWords<W>& group = words[slot].group[j * W::GROUPS + g];
      group = {};
      if (has_it) read |= group.read(scales + g * W::SCALES_BYTES, scales + W::GROUPS * W::SCALES_BYTES + g * W::ZEROS_BYTES, lane);
    }
    return read;
  }
};

// A task's product, as multiply_tiles has it for elements. `own`: the warp's scratch, to hold its slice of x. `AHEAD`: chunks of 8-bit codes in
// registers while x is waited for; of 4-bit ones there is one, as bytes: the ring covers a boundary without them.
template <class P, class Slice, int AHEAD>
__device__ __forceinline__ void multiply_quantised_tiles(Consumer& c, const MatVecTask& task, const uint64_t* packets, Expected want,
                                                         const float* gain, uint8_t* own) {
  const int tiles = task.tiles;
  Slice slice(c.warp);
  if constexpr (Slice::NORMALISED) slice.prefetch_gain(gain, c.lane);
  constexpr int DEPTH = P::W::BITS == 4 ? 1 : AHEAD;
  FetchedCodes<P, DEPTH> chunks(c.warp);
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) {
    chunks.fetch(c, d, d + 1 == P::CHUNKS);
    chunks.decode(d);
  }
  c.wait_released();
  FixedPointSlice<P, Slice> read;
  read.load(c, slice, packets, want, gain, own);
  __syncwarp();
  DigitOperands<P> x;
  x.begin(own, c.lane);
  const float squares = Slice::NORMALISED ? warp_sum(read.squares) : 0.f, unit = TileSums<P>::unit(read.down, c.lane);

#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    TileSums<P> sums;
#pragma unroll(DigitOperands<P>::KEPT ? P::CHUNKS : 1)
    for (int group = 0; group < P::CHUNKS; group += DEPTH)
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        const int k = group + d, next = k + DEPTH;
        const bool is_last = k + 1 == P::CHUNKS;
        chunks.multiply_into(sums, d, is_last, x, k);
        const ChunkWords<P> words = chunks.words[d];
        if (next < P::CHUNKS || tile + 1 < tiles) chunks.fetch(c, d, next + 1 == P::CHUNKS || next + 1 == 2 * P::CHUNKS);
        else chunks.forget();
        if constexpr (P::W::GROUP) sums.scale_groups(words, x, k);
        if (is_last) {
          float* part = c.wait_reduction_slot();
          if constexpr (!P::W::GROUP) sums.scale_row(words, x);
          sums.store(part, c.lane, unit);
          if (Slice::NORMALISED && c.lane == 1) part[TILE_ROWS] = squares;
          c.fill_reduction_slot();
        }
        chunks.decode(d);
      }
  }
}
