// What the actors of one SM share: launch parameters, the layout of shared memory, and each actor's place in the token.
#pragma once
#include "isa/device/element.cuh"
#include "isa/device/feed.cuh"

// A feed is how bytes come into the ring. Each has a file (isa/device/feed_*.cuh) with the same names; feed.cuh is
// the one that the program uses.
//   Barrier            where actors of a block meet, with barrier_init, barrier_init_done, barrier_arrive, barrier_passed (which may
//                      wait a moment) and barrier_tested (which does not)
//   FEEDER_LANES       lanes of the feeder's warp that run: 1, or all 32 in step
//   PIECE_A_LANE       a piece of a chunk is copied by the one lane that asks for it, not by all lanes together
//   FULL_ARRIVALS      arrivals at a stage's `full` barrier that say that its chunk has landed
//   begin_copies, copy_piece, end_copies
//                      start the copy of a chunk of some bytes, piece by piece (multiples of 16 bytes); `full` gets its arrivals when all of
//                      it is in the slot
//   order_copies       what this warp has acquired is seen by the copies that it starts next

constexpr int CONSUMER_THREADS = CONSUMER_WARPS * 32;
constexpr int BLOCK_THREADS = CONSUMER_THREADS + 96;  // and a feeder, a storer and a watcher warp
constexpr int TILE_ROWS = 16;
constexpr int FRAGMENT_BYTES = 512;
constexpr int SLOT_ROW = 20;  // floats of one warp's partial tile: 16 rows, the sum of squares, padding against bank conflicts
constexpr uint16_t NONE = 0xFFFF;

// A warp's arrival is its first lane's, after the others' accesses. In a build for racecheck, which does not follow what orders lanes of a warp,
// every lane makes one of its own, and waits for itself.
constexpr int WARP_ARRIVALS = EVERY_LANE_ARRIVES ? 32 : 1;
__device__ __forceinline__ bool arrives(int lane) { return EVERY_LANE_ARRIVES || lane == 0; }

struct Barriers {
  Barrier full[STAGES], empty[STAGES];                              // ring: copied / released by all consumers
  Barrier slot_full[REDUCTION_SLOTS], slot_free[REDUCTION_SLOTS];   // reduction: written by all consumers / read by the storer
  Barrier consumers;                                                // the consumers meet
  uint32_t released;                                                // tasks the watcher has released since the launch began
  uint32_t claimed;                                                 // the stream this block eats
  uint32_t finished;                                                // consumers that have finished a token, summed over tokens
};
static_assert(sizeof(Barriers) <= BARRIER_BYTES, "the barriers must fit the space the host reserves for them");

struct Block {
  const Params& p;
  uint8_t* shared;
  uint32_t sm;  // the stream this SM eats
  uint32_t tasks, entries;
  uint64_t weights;  // byte offset of the SM's stream
  bool appends_rows;  // has tail tasks: it tells the feeders when its token has ended

  __device__ Barriers& barriers() const { return *reinterpret_cast<Barriers*>(shared + BARRIER_OFFSET); }
  __device__ uint8_t* stage(int slot) const { return shared + slot * SLOT_BYTES; }
  __device__ float* scratch() const { return reinterpret_cast<float*>(shared + SCRATCH_OFFSET); }
  __device__ float* partial(int slot, int warp) const {
    return reinterpret_cast<float*>(shared + REDUCTION_OFFSET) + (slot * CONSUMER_WARPS + warp) * SLOT_ROW;
  }
  __device__ const uint8_t* task(int index) const { return shared + TASKS_OFFSET + index * TASK_BYTES; }
  __device__ int entry(int index) const { return reinterpret_cast<const uint16_t*>(shared + STREAM_OFFSET)[index]; }
  __device__ uint64_t* buffer(int id) const {
    return reinterpret_cast<uint64_t*>(p.arena) + reinterpret_cast<const uint32_t*>(shared + BUFFERS_OFFSET)[id];
  }
  __device__ const float* constant(int start) const { return reinterpret_cast<const float*>(p.constants) + start; }
  __device__ uint32_t* counter(int id) const { return reinterpret_cast<uint32_t*>(p.counters) + id; }
};

// Where a launch is: token `step` of the launch, at `position`, in `epoch` (tokens since the arena was zeroed, from 1).
struct Token {
  uint32_t step, position, epoch;
  __device__ Token(const Params& p, uint32_t step) : step(step), position(p.position + step), epoch(p.epoch + step + 1) {}
  __device__ uint32_t tag(uint32_t local) const { return epoch * TAGS + local; }
  __device__ Expected expect(uint32_t local) const { return {epoch * TAGS + local, local ? ~0u : 0u}; }
  __device__ Expected expect_carried(uint32_t local) const { return {(epoch - 1) * TAGS + local, local && step ? ~0u : 0u}; }
};

// The consumers' common fields of a task record.
struct TaskHead {
  uint16_t op, wait_counter, wait_count, done_counter;
};

// A consumer warp's place: the ring slot it takes next, the reduction slot it fills next, the tasks it has begun.
struct Consumer {
  const Block& b;
  Abort abort;
  int warp, lane;
  uint32_t slot = 0, slot_parity = 0, taken = 0;
  uint32_t red = 0, red_parity = 1;
  uint32_t meet_parity = 0;
  uint32_t sequence = 0;

  __device__ Consumer(const Block& b, int warp, int lane)
      : b(b), abort{reinterpret_cast<uint32_t*>(b.p.abort), b.p.spin_limit, CONSUMER, b.sm, 0, 0}, warp(warp), lane(lane) {}

  // The watcher has released the task this consumer is at.
  __device__ __forceinline__ void wait_released() {
    const uint32_t* released = &b.barriers().released;
    const uint32_t mine = sequence;
    wait_until(abort, WAIT_TASK, [=] { return reached(load_shared_acquire(released), mine); });
  }
  // Whether the next COUNT chunks have landed, and the next reduction slot is free: no need to wait for them then. Not so of more chunks than the
  // ring has stages: the barrier that the first of them uses says nothing of the one that comes after it, but may say that one before it landed.
  template <int COUNT>
  __device__ __forceinline__ bool chunks_landed() const {
    if (COUNT > STAGES || !chunk_landed(COUNT - 1)) return false;  // the last is the last to land, as a rule: while memory is waited for, one look is all
    return each_landed<COUNT - 1>();
  }
  // Without a branch.
  template <int COUNT>
  __device__ __forceinline__ bool each_landed() const {
    bool all = COUNT <= STAGES;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) all &= chunk_landed(i);
    return all;
  }
  __device__ __forceinline__ bool chunk_landed(int ahead) const {
    const bool wraps = slot + ahead >= STAGES;
    return barrier_tested(&b.barriers().full[wraps ? slot + ahead - STAGES : slot + ahead], slot_parity ^ wraps);
  }
  __device__ __forceinline__ bool reduction_slot_free() const { return barrier_tested(&b.barriers().slot_free[red], red_parity); }
  // The next chunk of the ring, taken: `landed` if that is known.
  __device__ __forceinline__ const uint8_t* wait_chunk(bool landed = false) {
    Barrier* bar = &b.barriers().full[slot];
    const uint32_t parity = slot_parity;
    if (!landed) wait_until(abort, WAIT_FULL, [=] { return barrier_passed(bar, parity); });
    taken = slot;
    if (++slot == STAGES) { slot = 0; slot_parity ^= 1; }
    return b.stage(taken);
  }
  // Frees the chunk that was taken last. `read`: words that depend on every load of this lane from it, so that no lane arrives before all lanes'
  // loads have come. That they have been issued is not enough: they queue behind other loads of the SM, and bulk copies do not.
  __device__ __forceinline__ void release_chunk(uint32_t read) {
    const bool none = __any_sync(~0u, (read & b.p.zero) != 0u);
    if (arrives(lane)) barrier_arrive(&b.barriers().empty[taken] + none);
  }
  // The same for the N chunks from slot `from` on, at once.
  template <int N>
  __device__ __forceinline__ void release_chunks(uint32_t from, uint32_t read) {
    const bool none = __any_sync(~0u, (read & b.p.zero) != 0u);
    if constexpr (EVERY_LANE_ARRIVES) {
      for (int i = 0; i < N; ++i) barrier_arrive(&b.barriers().empty[(from + i) % STAGES] + none);
      return;
    }
    const uint32_t at = from + lane < STAGES ? from + lane : from + lane - STAGES;
    if (lane < N) barrier_arrive(&b.barriers().empty[at] + none);
  }
  __device__ __forceinline__ float* wait_reduction_slot(bool is_free = false) {
    Barrier* bar = &b.barriers().slot_free[red];
    const uint32_t parity = red_parity;
    if (!is_free) wait_until(abort, WAIT_SLOT, [=] { return barrier_passed(bar, parity); });
    return b.partial(red, warp);
  }
  __device__ __forceinline__ void fill_reduction_slot() {
    __syncwarp();
    if (arrives(lane)) barrier_arrive(&b.barriers().slot_full[red]);
    if (++red == REDUCTION_SLOTS) { red = 0; red_parity ^= 1; }
  }
  // All consumers of the SM have arrived; what each wrote to shared memory before is visible to all.
  __device__ __forceinline__ void meet() {
    __syncwarp();
    Barrier* bar = &b.barriers().consumers;
    const uint32_t parity = meet_parity;
    if (arrives(lane)) barrier_arrive(bar);
    wait_until(abort, WAIT_BARRIER, [=] { return barrier_passed(bar, parity); });
    meet_parity ^= 1;
  }
  // This warp's publishes of the task are out: a hint to watchers.
  __device__ __forceinline__ void arrive_done(uint32_t counter) {
    __syncwarp();
    if (lane == 0 && counter != NONE) add_relaxed(b.counter(counter), 1);
  }
  __device__ __forceinline__ uint2 read(const uint64_t* packet, Expected want) {
    uint2 v = load_packet(packet);
    if (!want.match(v.y)) wait_until(abort, WAIT_TAG, [&] { v = load_packet(packet); return want.match(v.y); });
    return v;
  }
  // Reads N packets (uint2), or N pairs of neighbouring ones (uint4), number i at `at(i)`: all are asked for before the first is looked at, and
  // those that were not there are asked for together again.
  template <int N, class Packets, class At>
  __device__ __forceinline__ void read_all(Packets (&v)[N], Expected want, At at) {
    read_all(v, want, at, [] {});
  }
  // The same; `meanwhile` is done while they are on their way.
  template <int N, class Packets, class At, class Meanwhile>
  __device__ __forceinline__ void read_all(Packets (&v)[N], Expected want, At at, Meanwhile meanwhile) {
    auto here = [&] {
      bool all = true;
#pragma unroll
      for (int i = 0; i < N; ++i) all &= want.match(v[i]);
      return all;
    };
#pragma unroll
    for (int i = 0; i < N; ++i) load_into(v[i], at(i));
    meanwhile();
    if (here()) return;
    wait_until(abort, WAIT_TAG, [&] {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (!want.match(v[i])) load_into(v[i], at(i));
      return here();
    });
  }
};

// The storer's place: the reduction slot it empties next.
struct Storer {
  const Block& b;
  Abort abort;
  int lane;
  uint32_t red = 0, red_parity = 0;

  __device__ Storer(const Block& b, int lane)
      : b(b), abort{reinterpret_cast<uint32_t*>(b.p.abort), b.p.spin_limit, STORER, b.sm, 0, 0}, lane(lane) {}

  __device__ __forceinline__ float read(const uint64_t* packet, Expected want) {
    uint2 v = load_packet(packet);
    if (!want.match(v.y)) wait_until(abort, WAIT_TAG, [&] { v = load_packet(packet); return want.match(v.y); });
    return as_float(v.x);
  }
  // Sum over the consumer warps, in warp order within each half: lane r and lane r + 16 get row r; `squares`, where it is wanted, gets the
  // sum of x squared. Where the sums are is worked out before they are there, and both are handed on at once: others wait for this.
  __device__ __forceinline__ float reduce(bool want_squares, float& squares) {
    Barrier* bar = &b.barriers().slot_full[red];
    const uint32_t parity = red_parity;
    const int first = (red * CONSUMER_WARPS + (lane >> 4) * (CONSUMER_WARPS / 2)) * SLOT_ROW;
    const int row = opaque(first + (lane & 15)), of_squares = opaque(first + TILE_ROWS);
    wait_until(abort, WAIT_SLOT, [=] { return barrier_passed(bar, parity); });
    const float* sums = reinterpret_cast<const float*>(b.shared + REDUCTION_OFFSET);
    float sum = 0.f, ss = 0.f;
#pragma unroll
    for (int w = 0; w < CONSUMER_WARPS / 2; ++w) {
      sum += sums[row + w * SLOT_ROW];
      if (want_squares) ss += sums[of_squares + w * SLOT_ROW];
    }
    const float other_sum = __shfl_xor_sync(~0u, sum, 16), other_ss = __shfl_xor_sync(~0u, ss, 16);  // all lanes have read
    sum += other_sum;
    squares = ss + other_ss;
    if (arrives(lane)) barrier_arrive(&b.barriers().slot_free[red]);
    if (++red == REDUCTION_SLOTS) { red = 0; red_parity ^= 1; }
    return sum;
  }
};

// The feeder's place in the ring. Copies fill slot after slot; at most INFLIGHT are under way, or THROTTLED while WATERMARK stages are not free: what
// is landing then nobody waits for, but packets and looks at counters wait behind it.
// Where all lanes of the warp run it, they are in step.
struct Feeder {
  const Block& b;
  Abort abort;
  uint32_t slot = 0, empty_parity = 1;
  uint32_t oldest = 0, oldest_parity = 0;
  uint32_t under_way = 0;
  uint32_t products = 0;  // of a stretch, streamed so far

  __device__ Feeder(const Block& b)
      : b(b), abort{reinterpret_cast<uint32_t*>(b.p.abort), b.p.spin_limit, FEEDER, b.sm, 0, 0} {}

  // Polls `ready`; false, for every lane alike, when the launch is being aborted.
  // What one lane has acquired the warp's meeting hands on to all.
  template <class Ready>
  __device__ __forceinline__ bool wait(uint32_t kind, Ready ready) const {
    if constexpr (FEEDER_LANES == 1 || EVERY_LANE_ARRIVES) return poll_until(abort, kind, ready);
    bool here = true;
    if ((threadIdx.x & 31) == 0) here = poll_until(abort, kind, ready);
    here = __shfl_sync(~0u, here, 0);
    __syncwarp();
    return here;
  }
  // One look, for every lane alike.
  template <class Ready>
  __device__ __forceinline__ bool here(Ready ready) const {
    if constexpr (FEEDER_LANES == 1) return ready();
    bool is_here = false;
    if ((threadIdx.x & 31) == 0) is_here = ready();
    is_here = __shfl_sync(~0u, is_here, 0);
    __syncwarp();
    return is_here;
  }
  __device__ __forceinline__ bool wait_landed() {
    Barrier* bar = &b.barriers().full[oldest];
    const uint32_t parity = oldest_parity;
    if (!wait(WAIT_FULL, [=] { return barrier_passed(bar, parity); })) return false;
    if (++oldest == STAGES) { oldest = 0; oldest_parity ^= 1; }
    --under_way;
    return true;
  }
  // Whether the chunk WATERMARK before the next one has not been released, and so, as a rule, none of those since.
  __device__ __forceinline__ bool well_filled() const {
    const bool wraps = slot < WATERMARK;
    Barrier* empty = &b.barriers().empty[wraps ? slot + STAGES - WATERMARK : slot - WATERMARK];
    const uint32_t parity = wraps ? empty_parity : empty_parity ^ 1;
    return !here([=] { return barrier_tested(empty, parity); });
  }
  __device__ __forceinline__ uint32_t may_be_under_way() const { return WATERMARK && well_filled() ? THROTTLED : INFLIGHT; }
  // Waits until the next slot is free; false when the launch is being aborted. Between this and `started` come the copies into it.
  __device__ __forceinline__ bool wait_slot() {
    while (under_way >= may_be_under_way())
      if (!wait_landed()) return false;
    Barrier* empty = &b.barriers().empty[slot];
    const uint32_t parity = empty_parity;
    return wait(WAIT_EMPTY, [=] { return barrier_passed(empty, parity); });
  }
  __device__ __forceinline__ void started() {
    ++under_way;
    if (++slot == STAGES) { slot = 0; empty_parity ^= 1; }
  }
  // Streams one chunk into the next slot; false when the launch is being aborted.
  __device__ __forceinline__ bool stream(const uint8_t* source, uint32_t bytes) {
    if (!wait_slot()) return false;
    Barrier& full = b.barriers().full[slot];
    begin_copies(full, bytes);
    copy_piece(full, b.stage(slot), source, bytes);
    end_copies(full);
    started();
    return true;
  }
  // Copies that have been started must land before the block may end, aborted or not.
  __device__ void drain() {
    while (under_way) {
      while (!barrier_passed(&b.barriers().full[oldest], oldest_parity)) {}
      if (++oldest == STAGES) { oldest = 0; oldest_parity ^= 1; }
      --under_way;
    }
  }
};
