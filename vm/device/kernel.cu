// The megakernel: one block a SM, T tokens of the whole model in one cooperative launch.
#include "vm/device/actors.cuh"

// What the host compares with the program it is about to run: records, sizes and layout.
extern "C" __device__ const uint32_t amk_abi = ABI_HASH;

struct ImageHead {  // one SM's part of the program image; task records and stream entries follow, of a stretch the places of tiles
  uint32_t tasks, entries;
  uint64_t weights;
  uint32_t appends_rows, unused[3];
};

__device__ __forceinline__ void copy_words(uint8_t* to, const uint8_t* from, int bytes) {
#pragma unroll 1
  for (int i = threadIdx.x * 4; i < bytes; i += BLOCK_THREADS * 4)
    *reinterpret_cast<uint32_t*>(to + i) = *reinterpret_cast<const uint32_t*>(from + i);
}

__device__ __forceinline__ void init_barriers(Barriers& bars) {
  for (int i = 0; i < STAGES; ++i) {
    barrier_init(&bars.full[i], FULL_ARRIVALS);
    barrier_init(&bars.empty[i], CONSUMER_WARPS * WARP_ARRIVALS);
  }
  for (int i = 0; i < REDUCTION_SLOTS; ++i) {
    barrier_init(&bars.slot_full[i], CONSUMER_WARPS * WARP_ARRIVALS);
    barrier_init(&bars.slot_free[i], WARP_ARRIVALS);
  }
  barrier_init(&bars.consumers, CONSUMER_WARPS * WARP_ARRIVALS);
  bars.released = bars.finished = 0;
  barrier_init_done();
}

// The stream this block eats: that of its SM, claimed once a launch, or that of its index where the program has fewer SMs than the card.
__device__ __forceinline__ uint32_t claim_stream(const Params& p) {
  uint32_t sm;
  asm volatile("mov.u32 %0, %smid;" : "=r"(sm));
  if (!p.by_smid) sm = blockIdx.x;
  const bool taken = sm >= SMS || atomicExch(reinterpret_cast<uint32_t*>(p.claims) + sm, p.launch) == p.launch;
  if (taken || gridDim.x != SMS) {
    const Abort abort{reinterpret_cast<uint32_t*>(p.abort), p.spin_limit, 0, sm, 0, 0};
    raise_abort(abort, ABORT_PLACEMENT, 0);
    return ~0u;
  }
  return sm;
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1) megakernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  uint32_t& claimed = reinterpret_cast<Barriers*>(shared + BARRIER_OFFSET)->claimed;
  if (threadIdx.x == 0) claimed = claim_stream(p);
  __syncthreads();
  const uint32_t sm = claimed;
  if (sm == ~0u) return;
  const uint8_t* image = reinterpret_cast<const uint8_t*>(p.image) + (uint64_t)sm * IMAGE_BYTES;
  const ImageHead head = *reinterpret_cast<const ImageHead*>(image);
  copy_words(shared + TASKS_OFFSET, image + sizeof(ImageHead), head.tasks * TASK_BYTES);
  copy_words(shared + STREAM_OFFSET, image + sizeof(ImageHead) + MAX_TASKS * TASK_BYTES, (head.entries * 2 + 3) / 4 * 4);
#if GATED
  copy_words(shared + PLACES_OFFSET, image + IMAGE_PLACES, head.entries * PLACE_BYTES);
#endif
  copy_words(shared + BUFFERS_OFFSET, reinterpret_cast<const uint8_t*>(p.buffers), BUFFERS * 4);
  const Block block{p, shared, sm, head.tasks, head.entries, head.weights, head.appends_rows != 0};
  if (threadIdx.x == 0) init_barriers(block.barriers());
  TRACE(static_assert(sizeof(Barriers) + 4 * TRACE_WARPS <= BARRIER_BYTES, "the counts of events must fit behind the barriers");)
  TRACE(if (threadIdx.x == 0) trace_begin();)
  __syncthreads();

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (warp < CONSUMER_WARPS) run_consumer(block, warp, lane);
  else if (warp == CONSUMER_WARPS + 1) run_storer(block, lane);
  else if (warp == CONSUMER_WARPS && (FEEDER_LANES == 32 || lane == 0)) run_feeder(block);
  else if (warp == CONSUMER_WARPS + 2 && lane == 0) run_watcher(block);
}
