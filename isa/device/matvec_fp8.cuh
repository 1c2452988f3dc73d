// Weights that are floating-point numbers of 8 bits (E4M3) times x: their codes become elements as they are multiplied, exactly; the sum of a group,
// or of what a warp has of a row, is scaled at its end. In place of matvec_quantised.cuh in programs with such weights (vm/source.py), with its names.
//
// A fragment is 16 rows by 32 columns, two products' operands; a piece is one, or those of a group. vm.quantised_image has the order of codes.
#pragma once
#include "isa/device/weight_format.cuh"

// x is elements here, as where weights are elements: an x that comes as such has one part, one in fp32 a rounded part and its error.
constexpr int DIGITS = 1;
constexpr int plane_bytes(int columns) { return columns * ELEMENT_BYTES; }  // of a part

// A code's bits in the places of an element's sign, exponent and fraction make a number that is too small by a power of two, also where it is no normal
// one: 2^(127 - 7) as bf16, 2^(15 - 7) as fp16. The scales of rows make up for it. In bf16, where products would leave the range of fp32, x makes up
// for a part of it, and must be below 2^63.
constexpr bool OF_FP16 = ELEMENT == ELEMENT_FP16;
constexpr uint32_t X_UP = 0x5F805F80u;  // of bf16: 2^64, twice
constexpr float SCALE_UP = OF_FP16 ? 0x1p8f : 0x1p56f;

// The two codes of each half of a word, as elements: the first two, and the second two.
__device__ __forceinline__ uint32_t first_elements(uint32_t codes) {
  if constexpr (OF_FP16) return (codes & 0x80008000u) | (codes << 3 & 0x3F803F80u);
  return codes & 0x87F087F0u;
}
__device__ __forceinline__ uint32_t second_elements(uint32_t codes) {
  if constexpr (OF_FP16) return (codes << 4 & 0x80008000u) | (codes << 7 & 0x07800780u) | (codes >> 1 & 0x38003800u);
  return (codes << 4 & 0x80F080F0u) | (codes >> 4 & 0x07000700u);
}
// A fragment's columns 16 step to 16 step + 15 as the operand of `multiply`.
__device__ __forceinline__ uint4 elements_of(const uint4& fragment, int step) {
  const uint32_t low = step ? fragment.z : fragment.x, high = step ? fragment.w : fragment.y;
  return make_uint4(first_elements(low), first_elements(high), second_elements(low), second_elements(high));
}
// Two elements of x, times X_UP.
__device__ __forceinline__ uint32_t raised(uint32_t pair) {
  if constexpr (OF_FP16) return pair;
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(pair), "r"(X_UP), "r"(0x80008000u));  // plus -0
  return r;
}

// A warp's slice of x as operands, 16 columns a step: in registers, where it fits into some, or in scratch.
template <class P, bool TWO>
struct ElementOperands {
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
  __device__ __forceinline__ uint2 read(int step) const {
    const uint2 x = *reinterpret_cast<const uint2*>(from + step * 32);
    return make_uint2(raised(x.x), raised(x.y));
  }
};

// A lane's sums of rows g = lane / 4 and g + 8, four that do not wait for each other. `TWO`: column 1 is the product with x's errors.
template <class P, bool TWO>
struct ElementSums {
  using W = typename P::W;
  float low = 0.f, high = 0.f;  // scaled
  float acc[4][4] = {};         // not yet

  // Adds the j-th of a chunk's pieces, which begins at step `first` of x.
  template <class X>
  __device__ __forceinline__ void add(int j, const uint4 (&fragments)[W::FRAGMENTS], const X& x, int first) {
#pragma unroll
    for (int i = 0; i < 2 * W::FRAGMENTS; ++i) {
      const uint2 b = x.at(first + i);
      multiply(acc[(2 * W::FRAGMENTS * j + i) & 3], elements_of(fragments[i / 2], i & 1), b.x, b.y);
    }
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
  __device__ __forceinline__ void store(float* part, int lane) const {
    if (lane & 3) return;
    part[lane >> 2] = low;
    part[8 + (lane >> 2)] = high;
  }

 private:
  static __device__ __forceinline__ float scale_of(uint32_t bits) {
    if constexpr (!W::FP16_SCALE) return as_float(bits << 16) * SCALE_UP;
    float f;
    asm("{\n.reg .b16 h, unused;\nmov.b32 {h, unused}, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(f) : "r"(bits));
    return f * SCALE_UP;
  }
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
  float squares = slice.load(c, packets, want, gain, own, [] {});
  __syncwarp();
  using X = ElementOperands<P, TWO>;
  X x;
  x.begin(own, c.lane);
  if constexpr (Slice::NORMALISED) squares = warp_sum(squares);

#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    ElementSums<P, TWO> sums;
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
          sums.store(part, c.lane);
          if (Slice::NORMALISED && c.lane == 1) part[TILE_ROWS] = squares;
          c.fill_reduction_slot();
        }
      }
  }
}
