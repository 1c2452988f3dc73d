// Weights that are floating-point numbers of 8 bits (E4M3) times x: their codes become elements as they are multiplied, exactly; what a warp has
// of a row is scaled when the tile ends. In place of matvec_quantised.cuh in programs with such weights (vm/source.py), with its names.
//
// A fragment is 16 rows by 32 columns, two products' operands. vm.quantised_image has the order of codes in it.
#pragma once
#include "isa/device/weight_format.cuh"

// x is elements here, as where weights are elements: an x that comes as such has one part, one in fp32 a rounded part and its error.
constexpr int DIGITS = 1;
constexpr int plane_bytes(int columns) { return columns * ELEMENT_BYTES; }  // of a part

// The codes in the upper bytes of both halves of a word as two elements. The bits of a code in an element's places make a number that is too small
// by a power of two; the product with that is exact, also of what is no normal number.
__device__ __forceinline__ uint32_t elements_of(uint32_t codes) {
  constexpr uint32_t SIGNS = 0x80008000u;
  uint32_t r;
  if constexpr (ELEMENT == ELEMENT_FP16) {
    constexpr uint32_t UP = 0x5C005C00u;  // 2^8, the biases being 15 and 7
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"((codes & SIGNS) | (codes >> 1 & 0x3F803F80u)), "r"(UP));
  } else {
    constexpr uint32_t UP = 0x7B807B80u;  // 2^120, the biases being 127 and 7
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"((codes & SIGNS) | (codes >> 4 & 0x07F007F0u)), "r"(UP), "r"(SIGNS));
  }
  return r;
}
// A fragment's columns 16 step to 16 step + 15 as the operand of `multiply`.
__device__ __forceinline__ uint4 elements_of(const uint4& fragment, int step) {
  const uint32_t low = step ? fragment.z : fragment.x, high = step ? fragment.w : fragment.y;
  return make_uint4(elements_of(low), elements_of(high), elements_of(low << 8), elements_of(high << 8));
}

// A warp's slice of x as operands, 16 columns a step: in registers, where it fits into some, or in scratch.
template <class P, bool TWO>
struct ElementOperands {
  static constexpr int STEPS = P::SLICE / 16;
  static constexpr bool KEPT = 2 * STEPS <= 40;
  const uint8_t* from;
  uint2 kept[KEPT ? P::CHUNKS * P::PER_CHUNK * 2 : 1] = {};  // those beyond the slice are never used

  // After the warp has written its slice; lanes 4 to 7 hold column 1 of the product, the errors.
  __device__ __forceinline__ void begin(const uint8_t* slice, int lane) {
    from = slice + (TWO && lane >> 2 == 1 ? P::SLICE_BYTES : 0) + (lane & 3) * 8;
    if constexpr (KEPT) {
#pragma unroll
      for (int i = 0; i < STEPS; ++i) kept[i] = *reinterpret_cast<const uint2*>(from + i * 32);
    }
  }
  __device__ __forceinline__ uint2 at(int step) const {
    if constexpr (KEPT) return kept[step];
    return *reinterpret_cast<const uint2*>(from + step * 32);
  }
};

// A lane's partial sums of one tile, rows g = lane / 4 and g + 8, four that do not wait for each other.
template <class P>
struct ElementSums {
  float acc[4][4] = {};

  // Adds the j-th of a chunk's fragments, which begins at step `first` of x.
  template <class X>
  __device__ __forceinline__ void add(int j, const uint4& fragment, const X& x, int first) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint2 b = x.at(first + step);
      multiply(acc[(2 * j + step) & 3], elements_of(fragment, step), b.x, b.y);
    }
  }
  // The rows' sums times their scales, `scales` having those of rows g and g + 8; `two`: column 1 is the product with the errors.
  __device__ __forceinline__ void store(float* part, int lane, bool two, uint32_t scales) const {
    if (lane & 3) return;
    float low = (acc[0][0] + acc[1][0]) + (acc[2][0] + acc[3][0]), high = (acc[0][2] + acc[1][2]) + (acc[2][2] + acc[3][2]);
    if (two) {
      low += (acc[0][1] + acc[1][1]) + (acc[2][1] + acc[3][1]);
      high += (acc[0][3] + acc[1][3]) + (acc[2][3] + acc[3][3]);
    }
    part[lane >> 2] = low * scale_of(scales & 0xFFFFu);
    part[8 + (lane >> 2)] = high * scale_of(scales >> 16);
  }

 private:
  static __device__ __forceinline__ float scale_of(uint32_t bits) {
    if constexpr (!P::W::FP16_SCALE) return as_float(bits << 16);
    float f;
    asm("{\n.reg .b16 h, unused;\nmov.b32 {h, unused}, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(f) : "r"(bits));
    return f;
  }
};

// Fragments of the next chunks that are this warp's, and the scales of its lanes' rows, in registers.
template <class P, int DEPTH>
struct FetchedNumbers {
  static constexpr bool UNIFORM = P::HIGH_WARPS == 0 && P::LAST_HIGH == P::PER_CHUNK;  // the last chunk of a tile is as the others
  uint4 fragments[DEPTH][P::PER_CHUNK];
  uint32_t scales[DEPTH];
  const int last, last_at;  // fragments of this warp in the last chunk of a tile, and where they begin

  __device__ __forceinline__ FetchedNumbers(int warp)
      : last(warp < P::HIGH_WARPS ? P::LAST_HIGH : P::LAST_LOW),
        last_at((warp * P::LAST_LOW + min_of(warp, P::HIGH_WARPS)) * FRAGMENT_BYTES) {}
  __device__ __forceinline__ bool has(int j, bool is_last) const { return UNIFORM || !is_last || j < last; }
  // Waits for the next chunk in the ring, reads it and frees its slot.
  __device__ __forceinline__ void fetch(Consumer& c, int slot, bool is_last) {
    const uint8_t* chunk = c.wait_chunk();
    const uint8_t* from = chunk + (!UNIFORM && is_last ? last_at : c.warp * P::PER_CHUNK * FRAGMENT_BYTES) + c.lane * 16;
    const uint8_t* tail = chunk + (!UNIFORM && is_last ? P::LAST_BYTES : P::FULL_BYTES) - P::W::TAIL_BYTES;
    scales[slot] = *reinterpret_cast<const uint32_t*>(tail + (c.lane >> 2) * 4);
    uint32_t read = scales[slot];
#pragma unroll
    for (int j = 0; j < P::PER_CHUNK; ++j) {
      fragments[slot][j] = has(j, is_last) ? *reinterpret_cast<const uint4*>(from + j * FRAGMENT_BYTES) : uint4{};
      read |= fragments[slot][j].x;
    }
    c.release_chunk(read);
  }
};

// A task's product, as multiply_tiles has it for elements. `own`: the warp's scratch, to hold its slice of x. `DEPTH`: chunks in registers while x is
// waited for.
template <class P, class Slice, int DEPTH>
__device__ __forceinline__ void multiply_quantised_tiles(Consumer& c, const MatVecTask& task, const uint64_t* packets, Expected want,
                                                         const float* gain, uint8_t* own) {
  static_assert(P::W::BITS == 8 && P::W::FRAGMENTS == 1 && !P::W::GROUP && !P::W::ASYMMETRIC, "fp8 has a scale a row and no zeros");
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
    ElementSums<P> sums;
#pragma unroll(X::KEPT ? P::CHUNKS : 1)
    for (int group = 0; group < P::CHUNKS; group += DEPTH)
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        const int k = group + d, next = k + DEPTH;
        const bool is_last = k + 1 == P::CHUNKS;
#pragma unroll
        for (int j = 0; j < P::PER_CHUNK; ++j)
          if (chunks.has(j, is_last)) sums.add(j, chunks.fragments[d][j], x, (k * P::PER_CHUNK + j) * 2);
        const uint32_t scales = chunks.scales[d];
        if (next < P::CHUNKS || tile + 1 < tiles) chunks.fetch(c, d, next + 1 == P::CHUNKS || next + 1 == 2 * P::CHUNKS);
        if (is_last) {
          float* part = c.wait_reduction_slot();
          sums.store(part, c.lane, TWO, scales);
          if (Slice::NORMALISED && c.lane == 1) part[TILE_ROWS] = squares;
          c.fill_reduction_slot();
        }
      }
  }
}
