// A plain read of a buffer by a grid of 1024-thread blocks: the floor that latencies are compared with. LOADS loads of 16 bytes are in flight a thread.
struct Word4 {
  unsigned int x, y, z, w;
};

extern "C" __global__ void __launch_bounds__(1024) plain_read(const Word4* from, unsigned long long words, Word4* out) {
  Word4 a = {0u, 0u, 0u, 0u};
  const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
  unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + (LOADS - 1) * step < words; i += LOADS * step) {
    uint4 v[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; ++k) v[k] = __ldcs(reinterpret_cast<const uint4*>(from + i + k * step));
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
      a.x ^= v[k].x;
      a.y ^= v[k].y;
      a.z ^= v[k].z;
      a.w ^= v[k].w;
    }
  }
  for (; i < words; i += step) a.x ^= from[i].x;
  if (a.x == 0x12345u && a.y == 77u) out[0] = a;  // never true of random data, but the compiler cannot know: the reads stay
}
