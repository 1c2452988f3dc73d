// One warp's slice of x as it comes from packets, in registers, and its largest magnitude: for products that bring x to a scale of the slice's own.
#pragma once
#include "isa/device/weight_format.cuh"

__device__ __forceinline__ uint32_t warp_max(uint32_t v) {
#if TURING || __CUDA_ARCH__ < 800
#pragma unroll
  for (int d = 16; d; d >>= 1) v = max(v, __shfl_xor_sync(~0u, v, d));
  return v;
#else
  return __reduce_max_sync(~0u, v);
#endif
}

template <class P, class Slice>
struct SliceWords {
  static constexpr bool PAIRS = Slice::PAIRS;
  uint32_t words[Slice::LOADS][2];  // two pairs of elements, or two fp32 times their gains
  float squares = 0.f;              // this lane's sum of what it read

  // Returns the largest magnitude of the warp's slice.
  __device__ __forceinline__ float read(Consumer& c, const Slice& slice, const uint64_t* x, Expected want, const float* gain) {
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
    return PAIRS ? unpack_high(largest) : as_float(largest);
  }
  // write(words, column) for the lane's columns, those that pad the slice among them.
  template <class Write>
  __device__ __forceinline__ void each(const Slice& slice, int lane, Write write) const {
#pragma unroll
    for (int i = 0; i < Slice::LOADS; ++i) {
      const int at = slice.column(i, lane);
      if (Slice::WHOLE || at < P::SLICE) write(words[i], at);
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
};
