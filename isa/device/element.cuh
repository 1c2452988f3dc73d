// The machine's element type: packing two elements into a word, and the 16x8x16 product of a weight fragment with x.
#pragma once
#include "isa/device/types.cuh"

enum Element { ELEMENT_BF16 = 0, ELEMENT_FP16 = 1, ELEMENT_FP32 = 2 };
constexpr bool WIDE = ELEMENT == ELEMENT_FP32;  // fp32 weights and activations: products by FMA
constexpr int ELEMENT_BYTES = WIDE ? 4 : 2;
constexpr int NARROW = WIDE ? 1 : 2;               // elements in a narrow packet
constexpr int FRAGMENT_COLUMNS = WIDE ? 8 : 16;    // K columns of one 512-byte fragment of 16 rows
// Compute capability 7.5 has neither the product of 16 columns nor the conversion of two values at once.
// A test's build goes its way on any card.
constexpr bool BEFORE_AMPERE = TURING || __CUDA_ARCH__ < 800;

__device__ __forceinline__ float as_float(uint32_t v) { return __uint_as_float(v); }
__device__ __forceinline__ uint32_t as_bits(float v) { return __float_as_uint(v); }

// Two fp32 rounded to elements, `low` in the low half. On an fp32 machine this has no meaning and is not called.
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t r;
  if constexpr (ELEMENT == ELEMENT_FP16 && BEFORE_AMPERE)
    asm("{\n.reg .b16 l, h;\ncvt.rn.f16.f32 l, %1;\ncvt.rn.f16.f32 h, %2;\nmov.b32 %0, {l, h};\n}" : "=r"(r) : "f"(low), "f"(high));
  else if constexpr (ELEMENT == ELEMENT_FP16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float unpack_low(uint32_t v) {
  if constexpr (ELEMENT == ELEMENT_FP16) {
    float f;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, l;\n}" : "=f"(f) : "r"(v));
    return f;
  }
  return as_float(v << 16);
}
__device__ __forceinline__ float unpack_high(uint32_t v) {
  if constexpr (ELEMENT == ELEMENT_FP16) {
    float f;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(f) : "r"(v));
    return f;
  }
  return as_float(v & 0xFFFF0000u);
}
__device__ __forceinline__ float round_element(float v) {
  if constexpr (WIDE) return v;
  return unpack_low(pack2(v, 0.f));
}

// Half of the product below: 8 of its 16 columns.
__device__ __forceinline__ void multiply_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (ELEMENT == ELEMENT_FP16)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b));
  else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b));
}

// d[16 rows x 8 columns] += a[16 x 16] * b[16 x 8]; lane (g = lane / 4, t = lane % 4) holds d rows g, g + 8 and columns 2t, 2t + 1.
__device__ __forceinline__ void multiply(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  if constexpr (BEFORE_AMPERE) {
    multiply_half(d, a.x, a.y, b0);
    multiply_half(d, a.z, a.w, b1);
  } else if constexpr (ELEMENT == ELEMENT_FP16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, d));
  return v;
}
__device__ __forceinline__ float fast_exp2(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// Where the exponential is too small to be a normal number, or zero, the denominator is 1.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + fast_exp2(x * -1.4426950408889634f)); }
