// x for products in integers: one warp's slice as fixed-point numbers of three signed digits of 8 bits, most significant first.
//
// The unit is a power of two, such that the largest of the slice needs all 22 bits. So an fp32 x loses what is 2^-22 of the largest, which is what
// sums in fp32 lose too; a 16-bit element keeps every bit unless it is less than 2^-14 (bf16) of the largest.
#pragma once
#include "isa/device/slice_words.cuh"

constexpr int DIGITS = 3;
constexpr uint32_t HIGH_BITS = 0x80808080u;  // an unsigned byte less 128 is the signed byte with the high bit flipped

// Bytes from one plane (the digits of one weight) to the next: an odd multiple of 32, so that lanes that read all planes meet no bank twice.
constexpr int plane_bytes(int columns) { return columns | 32; }

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
struct FixedPointSlice : SliceWords<P, Slice> {
  static constexpr int PLANE = plane_bytes(P::SLICE);
  float down;  // a digit of the lowest plane is worth this

  __device__ __forceinline__ void load(Consumer& c, const Slice& slice, const uint64_t* x, Expected want, const float* gain, uint8_t* to) {
    const FixedPointScale scale(this->read(c, slice, x, want, gain));
    down = scale.down;
    this->each(slice, c.lane, [&](const uint32_t (&words)[2], int at) { write(scale, words, to + at); });
  }

 private:
  // The digits of neighbouring columns, each plane's next to each other.
  static __device__ __forceinline__ void write(const FixedPointScale& scale, const uint32_t (&w)[2], uint8_t* to) {
    if constexpr (Slice::PAIRS) {
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
