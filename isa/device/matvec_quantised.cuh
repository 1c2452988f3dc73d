// Quantised weights: codes become elements in registers, exactly; each group is summed alone in fp32 and scaled. vm.quantised_image has the
// order of codes in a fragment.
#pragma once
#include "isa/device/weight_format.cuh"

// A code beside the exponent of 2^7 (bf16) or 2^10 (fp16) is 128 or 1024 more than itself. Eight bits do not fit beside bf16's: there the
// upper bit chooses what is added to the lower seven, -128 or -256.
template <class W>
struct Codes {
  static constexpr bool FP16 = ELEMENT == ELEMENT_FP16, SIGNED = W::BITS == 8 && !FP16;
  static constexpr uint32_t ONE = FP16 ? 0x3C003C00u : 0x3F803F80u, MINUS_ONE = ONE | 0x80008000u;
  static constexpr uint32_t BIAS = FP16 ? 0x64006400u : 0x43004300u;

  static __device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    if constexpr (FP16) asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  // The codes in the lowest bits of both halves of `word`, all with the same bias: two elements. Nothing is rounded.
  static __device__ __forceinline__ uint32_t biased(uint32_t word) {
    if constexpr (W::BITS == 4) return (word & 0x000F000Fu) | BIAS;
    else if constexpr (FP16) return (word & 0x00FF00FFu) | BIAS;
    else return multiply_add((word & 0x007F007Fu) | BIAS, ONE, (word & 0x00800080u) ^ 0xC380C380u);  // code - 128
  }
  // Two elements code - zero; `zero` is the biased zero in both halves.
  static __device__ __forceinline__ uint32_t pair(uint32_t word, uint32_t zero) {
    if constexpr (SIGNED && !W::ASYMMETRIC) return biased(word);  // the zero is 128
    else return multiply_add(zero, MINUS_ONE, biased(word));
  }
};

// Scale and zero of a lane's two rows, g and g + 8, in one group, as the stream has them: both rows in one word.
template <class W>
struct GroupWords {
  uint32_t scales, zeros;

  // `scales` are the group's 16 (row g next to row g + 8), `zeros` likewise.
  __device__ __forceinline__ void read(const uint8_t* from_scales, const uint8_t* from_zeros, int lane) {
    scales = *reinterpret_cast<const uint32_t*>(from_scales + (lane >> 2) * 4);
    if constexpr (W::ASYMMETRIC) zeros = *reinterpret_cast<const uint16_t*>(from_zeros + (lane >> 2) * 2);
  }
  __device__ __forceinline__ uint32_t low_zero() const { return zero(0x4040); }
  __device__ __forceinline__ uint32_t high_zero() const { return zero(0x4141); }
  __device__ __forceinline__ float low_scale() const { return W::FP16_SCALE ? unpack_fp16(scales & 0xFFFF) : as_float(scales << 16); }
  __device__ __forceinline__ float high_scale() const { return W::FP16_SCALE ? unpack_fp16(scales >> 16) : as_float(scales & 0xFFFF0000u); }

 private:
  // The zero of a row, biased, in both halves; `bytes` puts its byte into the low byte of each.
  __device__ __forceinline__ uint32_t zero(uint32_t bytes) const {
    if constexpr (W::ASYMMETRIC) return Codes<W>::biased(__byte_perm(zeros, 0, bytes));
    else return Codes<W>::biased(W::BITS == 8 ? 0x00800080u : 0x00080008u);
  }
  static __device__ __forceinline__ float unpack_fp16(uint32_t half) {
    float f;
    asm("{\n.reg .b16 h, unused;\nmov.b32 {h, unused}, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(f) : "r"(half));
    return f;
  }
};

// Partial sums of one tile: a lane's rows g and g + 8, scaled. Lanes 0, 4, 8, ... hold what counts.
struct ScaledSums {
  float low = 0.f, high = 0.f;
  __device__ __forceinline__ void store(float* part, int lane) const {
    if (lane & 3) return;
    part[lane >> 2] = low;
    part[8 + (lane >> 2)] = high;
  }
};

// The product of one group's codes with x, not scaled. Two accumulators, so that a product need not wait for the one before; a group of 32
// is two products, and registers are short.
template <class W, bool TWO>
struct GroupSum {
  static constexpr int SUMS = W::GROUP == 32 ? 1 : 2;
  float acc[SUMS][4] = {};

  // Columns [FIRST, STOP) of a piece, 32 at a time: two products. `x`: this lane's part of the first 32.
  template <int FIRST, int STOP>
  __device__ __forceinline__ void add(const uint4* codes, const uint8_t* x, const GroupWords<W>& rows) {
    const uint32_t low_zero = rows.low_zero(), high_zero = rows.high_zero();
#pragma unroll
    for (int column = FIRST; column < STOP; column += 32) {
      const uint4 b = *reinterpret_cast<const uint4*>(x + column * ELEMENT_BYTES);
      const uint4& a = codes[column / W::FRAGMENT];
      if constexpr (W::BITS == 8) {
        add_one<0, 8>(0, a.x, a.y, low_zero, high_zero, b.x, b.y);
        add_one<0, 8>(1, a.z, a.w, low_zero, high_zero, b.z, b.w);
      } else {
        const uint32_t low = column % W::FRAGMENT ? a.z : a.x, high = column % W::FRAGMENT ? a.w : a.y;
        add_one<0, 4>(0, low, high, low_zero, high_zero, b.x, b.y);
        add_one<8, 12>(1, low, high, low_zero, high_zero, b.z, b.w);
      }
    }
  }
  // Column 0 of the product took x, column 1 its rounding errors.
  __device__ __forceinline__ void scale_into(ScaledSums& sums, const GroupWords<W>& rows) const {
    float low = 0.f, high = 0.f;
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
      low += TWO ? acc[i][0] + acc[i][1] : acc[i][0];
      high += TWO ? acc[i][2] + acc[i][3] : acc[i][2];
    }
    sums.low = fmaf(rows.low_scale(), low, sums.low);
    sums.high = fmaf(rows.high_scale(), high, sums.high);
  }

 private:
  template <int SHIFT0, int SHIFT1>
  __device__ __forceinline__ void add_one(int n, uint32_t low, uint32_t high, uint32_t low_zero, uint32_t high_zero, uint32_t b0,
                                          uint32_t b1) {
    using C = Codes<W>;
    const uint4 a = make_uint4(C::pair(low >> SHIFT0, low_zero), C::pair(high >> SHIFT0, high_zero), C::pair(low >> SHIFT1, low_zero),
                               C::pair(high >> SHIFT1, high_zero));
    multiply(acc[n % SUMS], a, b0, b1);
  }
};

// The pieces of one chunk that are this warp's, in registers: fetched one chunk ahead, as those of the other product are.
template <class P, bool TWO>
struct QuantisedChunk {
  using W = typename P::W;
  static constexpr int OWN_GROUPS = max_of(W::GROUPS, 1);  // of a piece; where a scale serves the row, of the chunk
  uint4 codes[P::PER_CHUNK][W::FRAGMENTS];
  GroupWords<W> groups[W::GROUP ? P::PER_CHUNK : 1][OWN_GROUPS];

  // Waits for the chunk in the ring, reads it and frees its slot. The last chunk of a tile holds `last` pieces of this warp at `last_at`.
  template <bool LAST>
  __device__ __forceinline__ void fetch(Consumer& c, int last, int last_at) {
    constexpr int MOST = LAST ? P::LAST_HIGH : P::PER_CHUNK;
    const uint8_t* chunk = c.wait_chunk();
    const uint8_t* from = chunk + (LAST ? last_at : c.warp * P::PER_CHUNK * W::PIECE_BYTES);
    if constexpr (!W::GROUP) {
      const uint8_t* tail = chunk + (LAST ? P::LAST_BYTES : P::FULL_BYTES) - W::TAIL_BYTES;
      groups[0][0].read(tail, tail + W::SCALES_BYTES, c.lane);
    }
#pragma unroll
    for (int j = 0; j < MOST; ++j)
      if (!LAST || !P::HIGH_WARPS || j < last) fetch_piece(j, from + j * W::PIECE_BYTES, c.lane);
    c.release_chunk();
  }
  // `x`: this lane's part of the first 32 columns of the chunk's first piece.
  template <bool LAST>
  __device__ __forceinline__ void multiply_into(ScaledSums& sums, int last, const uint8_t* x) const {
    constexpr int MOST = LAST ? P::LAST_HIGH : P::PER_CHUNK;
    GroupSum<W, TWO> row;
#pragma unroll
    for (int j = 0; j < MOST; ++j) {
      if (LAST && P::HIGH_WARPS && j >= last) continue;
      const uint8_t* own = x + j * W::COLUMNS * ELEMENT_BYTES;
      if constexpr (W::GROUP) multiply_groups<0>(sums, j, own);
      else row.template add<0, W::COLUMNS>(codes[j], own, groups[0][0]);
    }
    if constexpr (!W::GROUP) row.scale_into(sums, groups[0][0]);
  }

 private:
  __device__ __forceinline__ void fetch_piece(int j, const uint8_t* from, int lane) {
    const uint8_t* scales = from + W::FRAGMENTS * FRAGMENT_BYTES;
#pragma unroll
    for (int f = 0; f < W::FRAGMENTS; ++f) codes[j][f] = *reinterpret_cast<const uint4*>(from + f * FRAGMENT_BYTES + lane * 16);
#pragma unroll
    for (int g = 0; g < W::GROUPS; ++g)
      groups[j][g].read(scales + g * W::SCALES_BYTES, scales + W::GROUPS * W::SCALES_BYTES + g * W::ZEROS_BYTES, lane);
  }
  template <int GROUP>
  __device__ __forceinline__ void multiply_groups(ScaledSums& sums, int j, const uint8_t* x) const {
    if constexpr (GROUP < W::GROUPS) {
      GroupSum<W, TWO> sum;
      sum.template add<GROUP * W::GROUP, (GROUP + 1) * W::GROUP>(codes[j], x, groups[j][GROUP]);
      sum.scale_into(sums, groups[j][GROUP]);
      multiply_groups<GROUP + 1>(sums, j, x);
    }
  }
};

// A task's product, as multiply_tiles has it for elements. `own`: the warp's scratch, to hold its slice of x.
template <class P, class Slice, bool TWO>
__device__ __forceinline__ void multiply_quantised_tiles(Consumer& c, const MatVecTask& task, const uint64_t* x, Expected want,
                                                         const float* gain, uint8_t* own) {
  using Chunk = QuantisedChunk<P, TWO>;
  const int last = c.warp < P::HIGH_WARPS ? P::LAST_HIGH : P::LAST_LOW;
  const int last_at = (c.warp * P::LAST_LOW + min_of(c.warp, P::HIGH_WARPS)) * P::W::PIECE_BYTES;
  constexpr int CHUNK_OF_X = P::PER_CHUNK * P::W::COLUMNS * ELEMENT_BYTES;
  const int tiles = task.tiles;

  Slice slice(c.warp);
  if constexpr (Slice::NORMALISED) slice.prefetch_gain(gain, c.lane);
  Chunk next{};  // what some path leaves unwritten would be kept for all the kernel's life
  next.template fetch<P::CHUNKS == 1>(c, last, last_at);
  c.wait_released();
  float squares = slice.load(c, x, want, gain, own);
  __syncwarp();
  if constexpr (Slice::NORMALISED) squares = warp_sum(squares);
  const uint8_t* mine = own + (TWO && c.lane >> 2 == 1 ? P::SLICE_BYTES : 0) + (c.lane & 3) * 16;  // lanes 4 to 7 hold column 1

#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    ScaledSums sums;
#pragma unroll 2
    for (int k = 0; k + 1 < P::CHUNKS; ++k) {
      const Chunk chunk = next;
      if (k + 2 < P::CHUNKS) next.template fetch<false>(c, last, last_at);
      else next.template fetch<true>(c, last, last_at);
      chunk.template multiply_into<false>(sums, last, mine + k * CHUNK_OF_X);
    }
    const Chunk chunk = next;
    if (tile + 1 < tiles) next.template fetch<P::CHUNKS == 1>(c, last, last_at);
    chunk.template multiply_into<true>(sums, last, mine + (P::CHUNKS - 1) * CHUNK_OF_X);
    float* part = c.wait_reduction_slot();
    sums.store(part, c.lane);
    if (Slice::NORMALISED && c.lane == 1) part[TILE_ROWS] = squares;
    c.fill_reduction_slot();
  }
}
