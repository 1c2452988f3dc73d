// A plain read of a buffer by a grid of 1024-thread blocks: the floor that latencies are compared with.
struct Word4 {
  unsigned int x, y, z, w;
};

extern "C" __global__ void __launch_bounds__(1024) plain_read(const Word4* from, unsigned long long words, Word4* out) {
  Word4 a = {0u, 0u, 0u, 0u};
  const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
  unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 3 * step < words; i += 4 * step) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint4 v = __ldcs(reinterpret_cast<const uint4*>(from + i + k * step));
      a.x ^= v.x;
      a.y ^= v.y;
      a.z ^= v.z;
      a.w ^= v.w;
    }
  }
  for (; i < words; i += step) a.x ^= from[i].x;
  if (a.x == 0x12345u && a.y == 77u) out[0] = a;  // never true of random data, but the compiler cannot know: the reads stay
}
