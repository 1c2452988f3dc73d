// x for products in integers: one warp's slice as fixed-point numbers of three signed digits of 8 bits, most significant first.
//
// The unit is a power of two, such that the largest of the slice needs all 22 bits. So an fp32 x loses what is 2^-22 of the largest, which is what
// sums in fp32 lose too; a 16-bit element keeps every bit unless it is less than 2^-14 (bf16) of the largest.
#pragma once
#include "isa/device/weight_format.cuh"

constexpr int DIGITS = 3;
constexpr uint32_t HIGH_BITS = 0x80808080u;  // an unsigned byte less 128 is the signed byte with the high bit flipped

// Bytes from one plane (the digits of one weight) to the next: an odd multiple of 32, so that lanes that read all planes meet no bank twice.
constexpr int plane_bytes(int columns) { return columns | 32; }

__device__ __forceinline__ uint32_t warp_max(uint32_t v) {
#if TURING || __CUDA_ARCH__ < 800
#pragma unroll
  for (int d = 16; d; d >>= 1) v = max(v, __shfl_xor_sync(~0u, v, d));
  return v;
#else
  return __reduce_max_sync(~0u, v);
#endif
}

// The power of two that makes integers of up to 22 bits of a slice, and its inverse, by the slice's largest magnitude.
struct FixedPointScale {
  float up, down;
  // Below 2^-63 everything is 0. An x that is no number, or infinite, makes `down` no number, and so every sum.
  __device__ __forceinline__ explicit FixedPointScale(float largest) {
    const uint32_t exponent = max(as_bits(largest) >> 23, 64u);
    up = as_float((275u - exponent) << 23);
    down = fmaf(largest, 0.f, as_float((exponent - 21u) << 23));
  }
  // x as an integer v in [-2^22, 2^22], plus 0x8080: byte 2 is the upper digit, bytes 1 and 0 are the others plus 128.
  __device__ __forceinline__ uint32_t integer(float x) const {
    return as_bits(fmaf(x, up, 12582912.f)) - (0x4B400000u - 0x8080u);  // 1.5 * 2^23 has its unit in the lowest bit
  }
};

// The slice of a warp, from packets to digits in its scratch.
template <class P, class Slice>
struct FixedPointSlice {
  static constexpr int PLANE = plane_bytes(P::SLICE);
  static constexpr bool PAIRS = Slice::PAIRS;
  uint32_t words[Slice::LOADS][2];  // two pairs of elements, or two fp32
  float squares = 0.f;              // this lane's sum of what it read
  float down;                       // a digit of the lowest plane is worth this

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
    largest = warp_max(largest) >> 1;
    const FixedPointScale scale(PAIRS ? unpack_high(largest) : as_float(largest));
    down = scale.down;
#pragma unroll
    for (int i = 0; i < Slice::LOADS; ++i) {
      const int at = slice.column(i, c.lane);
      if (Slice::WHOLE || at < P::SLICE) write(scale, words[i], to + at);
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
  // The digits of neighbouring columns, each plane's next to each other.
  static __device__ __forceinline__ void write(const FixedPointScale& scale, const uint32_t (&w)[2], uint8_t* to) {
    if constexpr (PAIRS) {
      const uint32_t a = scale.integer(unpack_low(w[0])), b = scale.integer(unpack_high(w[0]));
      const uint32_t c = scale.integer(unpack_low(w[1])), d = scale.integer(unpack_high(w[1]));
      const uint32_t ab = __byte_perm(a, b, 0x5140), cd = __byte_perm(c, d, 0x5140);
      *reinterpret_cast<uint32_t*>(to) = __byte_perm(__byte_perm(a, b, 0x0062), __byte_perm(c, d, 0x0062), 0x5410);
      *reinterpret_cast<uint32_t*>(to + PLANE) = __byte_perm(ab, cd, 0x7632) ^ HIGH_BITS;
      *reinterpret_cast<uint32_t*>(to + 2 * PLANE) = __byte_perm(ab, cd, 0x5410) ^ HIGH_BITS;
    } else {
      const uint32_t a = scale.integer(as_float(w[0])), b = scale.integer(as_float(w[1]));
      const uint32_t ab = __byte_perm(a, b, 0x5140) ^ HIGH_BITS;
      *reinterpret_cast<uint16_t*>(to) = __byte_perm(a, b, 0x0062);
      *reinterpret_cast<uint16_t*>(to + PLANE) = ab >> 16;
      *reinterpret_cast<uint16_t*>(to + 2 * PLANE) = ab;
    }
  }
};
