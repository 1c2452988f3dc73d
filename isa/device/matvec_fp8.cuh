// Weights that are floating-point numbers of 8 bits (E4M3) times x: their codes become fp16 as they are multiplied, exactly, and so does x, times a
// power of two that is each warp's own; the sum of a group, or of what a warp has of a row, is scaled at its end. In place of matvec_quantised.cuh
// in programs with such weights (vm/source.py), with its names.
//
// A fragment is 16 rows by 32 columns, two products' operands; a piece is one, or those of a group. vm.quantised_image has the order of codes.
#pragma once
#include "isa/device/weight_format.cuh"

// An x in 16 bits has one part, one in fp32 a rounded part and its error.
constexpr int DIGITS = 1;
constexpr int plane_bytes(int columns) { return columns * ELEMENT_BYTES; }  // of a part
// Whether an instruction makes codes fp16. A test's build goes without on any card.
constexpr bool HAS_FP8 = !TURING && __CUDA_ARCH__ >= 890;

// The two codes in bytes `first` and first + 1 of a word, as fp16. With their bits in the places of sign, exponent and fraction they are too small by
// 2^(15 - 7), also those that are no normal numbers.
__device__ __forceinline__ uint32_t halves_by_bits(uint32_t codes, int first) {
  const uint32_t apart = __byte_perm(codes, 0, first ? 0x3424 : 0x1404), small = (apart & 0x80008000u) | (apart >> 1 & 0x3F803F80u);
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(small), "r"(0x5C005C00u));  // 2^8
  return r;
}
// The four codes of a word as fp16.
__device__ __forceinline__ uint2 halves_of(uint32_t codes) {
  uint2 r;
  if constexpr (HAS_FP8)
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}" : "=r"(r.x), "=r"(r.y) : "r"(codes));
  else r = make_uint2(halves_by_bits(codes, 0), halves_by_bits(codes, 2));
  return r;
}
// Half of the product below, 8 of its 16 columns: compute capability 7.5 has no larger one.
__device__ __forceinline__ void multiply_half_of_codes(float (&d)[4], uint32_t low, uint32_t high, uint32_t x) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(low), "r"(high), "r"(x));
}
// d[16 rows x 8 columns] += columns 16 step to 16 step + 15 of a fragment times x; a lane holds d as in `multiply`.
__device__ __forceinline__ void multiply_codes(float (&d)[4], const uint4& fragment, int step, uint2 x) {
  const uint2 low = halves_of(step ? fragment.z : fragment.x), high = halves_of(step ? fragment.w : fragment.y);
  if constexpr (BEFORE_AMPERE) {
    multiply_half_of_codes(d, low.x, high.x, x.x);
    multiply_half_of_codes(d, low.y, high.y, x.y);
  } else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(low.x), "r"(high.x), "r"(low.y), "r"(high.y), "r"(x.x), "r"(x.y));
}

__device__ __forceinline__ float half_low(uint32_t v) {
  float f;
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, l;\n}" : "=f"(f) : "r"(v));
  return f;
}
// Two fp32 rounded to fp16, `low` in the low half.
__device__ __forceinline__ uint32_t halves(float low, float high) {
  uint32_t r;
  if constexpr (BEFORE_AMPERE)
    asm("{\n.reg .b16 l, h;\ncvt.rn.f16.f32 l, %1;\ncvt.rn.f16.f32 h, %2;\nmov.b32 %0, {l, h};\n}" : "=r"(r) : "f"(low), "f"(high));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ uint32_t warp_largest(uint32_t v) {
#if TURING || __CUDA_ARCH__ < 800
#pragma unroll
  for (int d = 16; d; d >>= 1) v = max(v, __shfl_xor_sync(~0u, v, d));
  return v;
#else
  return __reduce_max_sync(~0u, v);
#endif
}

// The power of two that takes the largest magnitude of a slice to 2^14 or above, below 2^15, and its inverse.
struct HalfScale {
  float up, down;
  // Below 2^-63 the largest stays smaller. An x that is no number, or infinite, makes `down` no number, and so every sum.
  __device__ __forceinline__ explicit HalfScale(float largest) {
    const uint32_t exponent = max(as_bits(largest) >> 23, 64u);
    up = as_float((268u - exponent) << 23);
    down = fmaf(largest, 0.f, as_float((exponent - 14u) << 23));
  }
};

// The slice of a warp, from packets to fp16 in its scratch: what is less than 2^-29 of the largest loses bits below 2^-39 of it.
template <class P, class Slice>
struct HalfSlice {
  static constexpr bool PAIRS = Slice::PAIRS;
  uint32_t words[Slice::LOADS][2];  // two pairs of elements, or two fp32
  float squares = 0.f;              // this lane's sum of what it read
  float down;                       // what 1 in scratch is worth

  __device__ __forceinline__ void load(Consumer& c, const Slice& slice, const uint64_t* x, Expected want, const float* gain, uint8_t* to) {
    uint32_t largest = 0;  // magnitudes as integers, one bit to the left
#pragma unroll
    for (int base = 0; base < Slice::LOADS; base += Slice::BATCH) {
      uint4 v[Slice::BATCH];
      c.read_all(v, want, [&](int i) { return x + slice.source(min_of(base + i, Slice::LOADS - 1), c.lane); });
#pragma unroll
      for (int i = 0; i < Slice::BATCH; ++i)
        if (base + i < Slice::LOADS) largest = max(largest, take(v[i], slice, gain, base + i, c.lane));
    }
    largest = warp_largest(largest) >> 1;
    const HalfScale scale(PAIRS ? unpack_high(largest) : as_float(largest));
    down = scale.down;
#pragma unroll
    for (int i = 0; i < Slice::LOADS; ++i) {
      const int at = slice.column(i, c.lane);
      if (Slice::WHOLE || at < P::SLICE) write(scale.up, words[i], to + at * 2);
    }
  }

 private:
  __device__ __forceinline__ uint32_t take(const uint4& v, const Slice& slice, const float* gain, int load, int lane) {
    const int at = slice.column(load, lane);
    const bool mine = Slice::WHOLE || at < slice.count;
    words[load][0] = mine ? v.x : 0;
    words[load][1] = mine ? v.z : 0;
    if constexpr (PAIRS) return max(max(words[load][0] << 1, words[load][0] << 17), max(words[load][1] << 1, words[load][1] << 17));
    if constexpr (Slice::NORMALISED) {
      float a = as_float(words[load][0]), b = as_float(words[load][1]);
      squares += a * a + b * b;
      const float2 gains = slice.gain_at(gain, load, at);
      words[load][0] = as_bits(a * gains.x);
      words[load][1] = as_bits(b * gains.y);
    }
    return max(words[load][0] << 1, words[load][1] << 1);
  }
  static __device__ __forceinline__ void write(float up, const uint32_t (&w)[2], uint8_t* to) {
    if constexpr (PAIRS) {
      const uint32_t first = halves(unpack_low(w[0]) * up, unpack_high(w[0]) * up);
      *reinterpret_cast<uint2*>(to) = make_uint2(first, halves(unpack_low(w[1]) * up, unpack_high(w[1]) * up));
    } else {
      const float a = as_float(w[0]) * up, b = as_float(w[1]) * up;
      const uint32_t rounded = halves(a, b);
      *reinterpret_cast<uint32_t*>(to) = rounded;
      *reinterpret_cast<uint32_t*>(to + P::SLICE_BYTES) = halves(a - half_low(rounded), b - half_low(rounded >> 16));
    }
  }
};

// A warp's slice of x as operands, 16 columns a step: in registers, where it fits into some, or in scratch.
template <class P, bool TWO>
struct HalfOperands {
  static constexpr int STEPS = P::SLICE / 16;
  static constexpr bool KEPT = 2 * STEPS <= 40;
  const uint8_t* from;
  uint2 kept[KEPT ? P::CHUNKS * P::PER_CHUNK * P::W::COLUMNS / 16 : 1] = {};  // those beyond the slice are never used

  // After the warp has written its slice; lanes 4 to 7 hold column 1 of the product, the errors.
  __device__ __forceinline__ void begin(const uint8_t* slice, int lane) {
    from = slice + (TWO && lane >> 2 == 1 ? P::SLICE_BYTES : 0) + (lane & 3) * 8;
    if constexpr (KEPT) {
#pragma unroll
      for (int i = 0; i < STEPS; ++i) kept[i] = read(i);
    }
  }
  __device__ __forceinline__ uint2 at(int step) const {
    if constexpr (KEPT) return kept[step];
    return read(step);
  }

 private:
  __device__ __forceinline__ uint2 read(int step) const { return *reinterpret_cast<const uint2*>(from + step * 32); }
};

// A lane's sums of rows g = lane / 4 and g + 8, four that do not wait for each other. `TWO`: column 1 is the product with x's errors.
template <class P, bool TWO>
struct HalfSums {
  using W = typename P::W;
  float low = 0.f, high = 0.f;  // scaled
  float acc[4][4] = {};         // not yet

  // Adds the j-th of a chunk's pieces, which begins at step `first` of x.
  template <class X>
  __device__ __forceinline__ void add(int j, const uint4 (&fragments)[W::FRAGMENTS], const X& x, int first) {
#pragma unroll
    for (int i = 0; i < 2 * W::FRAGMENTS; ++i) multiply_codes(acc[(2 * W::FRAGMENTS * j + i) & 3], fragments[i / 2], i & 1, x.at(first + i));
  }
  // What was added since the last time counts, times its rows' scales.
  __device__ __forceinline__ void scale(uint32_t scales) {
    float of_low = 0.f, of_high = 0.f;
#pragma unroll
    for (int column = 0; column < (TWO ? 2 : 1); ++column) {
      of_low += (acc[0][column] + acc[1][column]) + (acc[2][column] + acc[3][column]);
      of_high += (acc[0][column + 2] + acc[1][column + 2]) + (acc[2][column + 2] + acc[3][column + 2]);
    }
    low = fmaf(scale_of(scales & 0xFFFFu), of_low, low);
    high = fmaf(scale_of(scales >> 16), of_high, high);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[i][k] = 0.f;
  }
  // `down`: what 1 in x is worth.
  __device__ __forceinline__ void store(float* part, int lane, float down) const {
    if (lane & 3) return;
    part[lane >> 2] = low * down;
    part[8 + (lane >> 2)] = high * down;
  }

 private:
  static __device__ __forceinline__ float scale_of(uint32_t bits) { return W::FP16_SCALE ? half_low(bits) : as_float(bits << 16); }
};

// Fragments of the next chunks that are this warp's, and the scales of its lanes' rows, in registers.
template <class P, int DEPTH>
struct FetchedNumbers {
  using W = typename P::W;
  static constexpr bool UNIFORM = P::HIGH_WARPS == 0 && P::LAST_HIGH == P::PER_CHUNK;  // the last chunk of a tile is as the others
  uint4 fragments[DEPTH][P::PER_CHUNK][W::FRAGMENTS];
  uint32_t scales[DEPTH][W::GROUP ? P::PER_CHUNK : 1];
  const int last, last_at;  // pieces of this warp in the last chunk of a tile, and where they begin

  __device__ __forceinline__ FetchedNumbers(int warp)
      : last(warp < P::HIGH_WARPS ? P::LAST_HIGH : P::LAST_LOW),
        last_at((warp * P::LAST_LOW + min_of(warp, P::HIGH_WARPS)) * W::PIECE_BYTES) {}
  __device__ __forceinline__ bool has(int j, bool is_last) const { return UNIFORM || !is_last || j < last; }
  // Waits for the next chunk in the ring, reads it and frees its slot.
  __device__ __forceinline__ void fetch(Consumer& c, int slot, bool is_last) {
    const uint8_t* chunk = c.wait_chunk();
    const uint8_t* from = chunk + (!UNIFORM && is_last ? last_at : c.warp * P::PER_CHUNK * W::PIECE_BYTES);
    uint32_t read = 0;
#pragma unroll
    for (int j = 0; j < P::PER_CHUNK; ++j) {
      const uint8_t* piece = from + j * W::PIECE_BYTES;
      const bool mine = has(j, is_last);
#pragma unroll
      for (int f = 0; f < W::FRAGMENTS; ++f) {
        uint4& to = fragments[slot][j][f];
        to = mine ? *reinterpret_cast<const uint4*>(piece + f * FRAGMENT_BYTES + c.lane * 16) : uint4{};
        read |= to.x;
      }
      if constexpr (W::GROUP != 0) read |= scales[slot][j] = mine ? scales_at(piece + W::FRAGMENTS * FRAGMENT_BYTES, c.lane) : 0;
    }
    if constexpr (!W::GROUP) read |= scales[slot][0] = scales_at(chunk + (!UNIFORM && is_last ? P::LAST_BYTES : P::FULL_BYTES) - W::TAIL_BYTES, c.lane);
    c.release_chunk(read);
  }
  template <class S, class X>
  __device__ __forceinline__ void multiply_into(S& sums, int slot, bool is_last, const X& x, int chunk) const {
#pragma unroll
    for (int j = 0; j < P::PER_CHUNK; ++j) {
      if (!has(j, is_last)) continue;
      sums.add(j, fragments[slot][j], x, (chunk * P::PER_CHUNK + j) * 2 * W::FRAGMENTS);
      if constexpr (W::GROUP != 0) sums.scale(scales[slot][j]);
    }
    if (!W::GROUP && is_last) sums.scale(scales[slot][0]);
  }

 private:
  // Of rows g and g + 8, in one word.
  static __device__ __forceinline__ uint32_t scales_at(const uint8_t* from, int lane) {
    return *reinterpret_cast<const uint32_t*>(from + (lane >> 2) * 4);
  }
};

// A task's product, as multiply_tiles has it for elements. `own`: the warp's scratch, to hold its slice of x. `DEPTH`: chunks in registers while x is
// waited for.
template <class P, class Slice, int DEPTH>
__device__ __forceinline__ void multiply_quantised_tiles(Consumer& c, const MatVecTask& task, const uint64_t* packets, Expected want,
                                                         const float* gain, uint8_t* own) {
  static_assert(P::W::BITS == 8 && P::W::GROUPS <= 1 && !P::W::ASYMMETRIC, "fp8 has a scale a row or a piece, and no zeros");
  constexpr bool TWO = !Slice::PAIRS;
  static_assert((TWO ? 2 : 1) * P::SLICE_BYTES <= SCRATCH_BYTES / CONSUMER_WARPS / 16 * 16, "a consumer's share of scratch must hold its slice of x");
  const int tiles = task.tiles;
  Slice slice(c.warp);
  if constexpr (Slice::NORMALISED) slice.prefetch_gain(gain, c.lane);
  FetchedNumbers<P, DEPTH> chunks(c.warp);
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) chunks.fetch(c, d, d + 1 == P::CHUNKS);
  c.wait_released();
  HalfSlice<P, Slice> read;
  read.load(c, slice, packets, want, gain, own);
  __syncwarp();
  using X = HalfOperands<P, TWO>;
  X x;
  x.begin(own, c.lane);
  const float squares = Slice::NORMALISED ? warp_sum(read.squares) : 0.f;

#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    HalfSums<P, TWO> sums;
#pragma unroll(X::KEPT ? P::CHUNKS : 1)
    for (int group = 0; group < P::CHUNKS; group += DEPTH)
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        const int k = group + d, next = k + DEPTH;
        const bool is_last = k + 1 == P::CHUNKS;
        chunks.multiply_into(sums, d, is_last, x, k);
        if (next < P::CHUNKS || tile + 1 < tiles) chunks.fetch(c, d, next + 1 == P::CHUNKS || next + 1 == 2 * P::CHUNKS);
        if (is_last) {
          float* part = c.wait_reduction_slot();
          sums.store(part, c.lane, read.down);
          if (Slice::NORMALISED && c.lane == 1) part[TILE_ROWS] = squares;
          c.fill_reduction_slot();
        }
      }
  }
}
