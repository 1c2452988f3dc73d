// The best of several candidates for the next token.
#pragma once
#include "isa/device/types.cuh"

// The better of two candidates: larger value, lower row on ties.
__device__ __forceinline__ void keep_best(float& value, int& row, float other_value, int other_row) {
  if (other_value > value || (other_value == value && other_row < row)) {
    value = other_value;
    row = other_row;
  }
}
__device__ __forceinline__ void warp_best(float& value, int& row) {
#pragma unroll
  for (int d = 16; d; d >>= 1) keep_best(value, row, __shfl_xor_sync(~0u, value, d), __shfl_xor_sync(~0u, row, d));
}
