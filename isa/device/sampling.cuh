// Scores, noise, masses and the end of a launch, bit for bit as isa/sampling.py has them: each operation is rounded by itself, none is fused.
#pragma once
#include "isa/device/block.cuh"

constexpr float FINITE = 3.4028234663852886e38f;
constexpr float LEAST_EXPONENT = -60.f;
constexpr int ROOT_HALF_BITS = 0x3F3504F3;

__device__ __forceinline__ float sum_of(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float difference(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }

// ---- noise

// Philox4x32-10.
__device__ __forceinline__ uint4 philox(uint2 key, uint4 c) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = (uint64_t)c.x * 0xD2511F53u, b = (uint64_t)c.z * 0xCD9E8D57u;
    c = make_uint4((uint32_t)(b >> 32) ^ c.y ^ key.x, (uint32_t)b, (uint32_t)(a >> 32) ^ c.w ^ key.y, (uint32_t)a);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return c;
}

// x = (1 + f) 2^k with 1 + f from the root of 1/2 to the root of 2.
struct Reduced {
  float f, k;
};
__device__ __forceinline__ Reduced reduced(float x) {
  const int bits = __float_as_int(x), k = (bits - ROOT_HALF_BITS) >> 23;
  return {difference(__int_as_float(bits - (k << 23)), 1.f), (float)k};
}
__device__ __forceinline__ float logarithm(Reduced x) {
  const float s = __fdiv_rn(x.f, sum_of(2.f, x.f));
  const float z = product(s, s);
  float series = 2.f / 9.f;
  series = sum_of(product(series, z), 2.f / 7.f);
  series = sum_of(product(series, z), 2.f / 5.f);
  series = sum_of(product(series, z), 2.f / 3.f);
  const float tail = sum_of(sum_of(s, s), product(s, product(z, series)));
  return sum_of(product(x.k, 0.693359375f), sum_of(product(x.k, -2.1219444005469057e-4f), tail));
}
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float v = fminf(product(sum_of(__uint2float_rn(word), 0.5f), 1.f / 4294967296.f), 1.f - 1.f / 16777216.f);
  const Reduced whole = reduced(difference(1.f, v));
  const float exponential = -logarithm(v < 0.29f ? Reduced{-v, 0.f} : whole);
  return -logarithm(reduced(exponential));
}

// The noise of a warp's rows: four a lane, as one counter gives them, for 128 rows at a time.
struct Noise {
  const uint2 key;
  const uint32_t position;
  const bool silent;
  int group = -1;
  float rows[4] = {};

  __device__ __forceinline__ Noise(const Params& p, uint32_t position)
      : key(make_uint2(p.seed_low, p.seed_high)), position(position), silent(as_float(p.temperature) == 0.f) {}
  // That of row `first` + lane % 16, where a tile begins at `first`. By all lanes of a warp.
  __device__ __forceinline__ float of_tile(int first, int lane) {
    if (silent) return 0.f;
    if (first >> 7 != group) {
      group = first >> 7;
      const uint4 words = philox(key, make_uint4((uint32_t)(group * 32 + lane), position, 0u, 0u));
      rows[0] = gumbel(words.x);
      rows[1] = gumbel(words.y);
      rows[2] = gumbel(words.z);
      rows[3] = gumbel(words.w);
    }
    const int from = ((first & 127) + (lane & 15)) >> 2;
    const float a = __shfl_sync(~0u, rows[0], from), b = __shfl_sync(~0u, rows[1], from);
    const float c = __shfl_sync(~0u, rows[2], from), d = __shfl_sync(~0u, rows[3], from);
    return lane & 2 ? (lane & 1 ? d : c) : (lane & 1 ? b : a);
  }
};

// ---- scores and masses

__device__ __forceinline__ float score_of(float logit, float temperature) {
  const float warm = temperature > 0.f ? __fdiv_rn(logit, temperature) : logit;
  return sum_of(fminf(fmaxf(warm, -FINITE), FINITE), 0.f);  // no NaN, no infinity, no negative zero
}

// Scores in the order of unsigned integers, and back.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = as_bits(score);
  return bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}
__device__ __forceinline__ float score_of_key(uint32_t key) { return as_float(key ^ (key >> 31 ? 0x80000000u : ~0u)); }

// e^d = m 2^-n for d from LEAST_EXPONENT to 0.
struct Power {
  float m;
  int n;
};
__device__ __forceinline__ Power power_of(float d) {
  const float n = rintf(product(d, 1.4426950408889634f));
  const float r = difference(difference(d, product(n, 0.693359375f)), product(n, -2.1219444005469057e-4f));
  float series = 1.f / 5040.f;
  series = sum_of(product(series, r), 1.f / 720.f);
  series = sum_of(product(series, r), 1.f / 120.f);
  series = sum_of(product(series, r), 1.f / 24.f);
  series = sum_of(product(series, r), 1.f / 6.f);
  series = sum_of(product(series, r), 1.f / 2.f);
  return {sum_of(sum_of(product(product(r, r), series), r), 1.f), -(int)n};
}
__device__ __forceinline__ float exponential(float d) {
  if (d < LEAST_EXPONENT) return 0.f;
  const Power e = power_of(d);
  return __int_as_float(__float_as_int(e.m) - (e.n << 23));
}
// e^d, `times` from 0 to 16, in units of 2^-41.
__device__ __forceinline__ uint64_t mass_of(float d, float times = 1.f) {
  if (d < LEAST_EXPONENT) return 0;
  const Power e = power_of(d);
  return (uint64_t)__float2uint_rz(product(product(e.m, times), 16777216.f)) << 17 >> e.n;
}

// ---- the chosen token

// The launch's stop token number `lane`, -1 where it has none: asked for early, since it lies in global memory.
__device__ __forceinline__ int32_t stop_token(const Params& p, int lane) {
  return lane < (int)p.stop_count ? __ldg(reinterpret_cast<const int32_t*>(p.stops) + lane) : -1;
}
// Hands the token to the host and, unless it is a stop token after which no token of the host comes, to the next step. By a whole warp.
__device__ __forceinline__ void choose_token(Consumer& c, int row, int32_t stop, uint64_t* out, uint32_t tag, const Token& token) {
  const Params& p = c.b.p;
  const bool ends = __any_sync(~0u, stop == row) && token.step + 1 >= p.forced;
  if (c.lane == 0) {
    if (!ends) publish(out, (uint32_t)row, tag);
    store_for_host(reinterpret_cast<uint32_t*>(p.tokens_out) + token.step, (uint32_t)row);
    if (ends) end_launch(c.abort, token.step + 1);
  }
}
