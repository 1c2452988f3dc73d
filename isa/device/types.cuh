// Integer types and compile-time arithmetic. No header of the toolkit is needed, so NVRTC builds from this text alone.
#pragma once

using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#define offsetof(type, member) __INTADDR__(&(((type*)0)->member))  // the constant form that NVRTC's front end knows

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int min_of(int a, int b) { return a < b ? a : b; }
constexpr int max_of(int a, int b) { return a > b ? a : b; }

// `v`, in a form that the compiler knows nothing of: what is computed from it is computed where it is used and not kept in registers from the
// beginning of the kernel on.
__device__ __forceinline__ int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
// The same of an address in global memory: computed here, so before a wait that follows, not where it is used.
__device__ __forceinline__ uint64_t* opaque(uint64_t* p) {
  asm volatile("" : "+l"(p));
  return p;
}
