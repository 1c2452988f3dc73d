// draw: as sample, of candidates with noise.
#pragma once
#include "isa/sample.cuh"

__device__ __forceinline__ void consume_draw(Consumer& c, const DrawTask& task, const Token& token) {
  consume_sample(c, reinterpret_cast<const SampleTask&>(task), token);
}
