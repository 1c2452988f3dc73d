// A stretch: BATCH consecutive positions of one sequence, a seat each (isa/stretch.py says how their values lie in the arena).
//
// Values carry no tags: a task's counter has said that all it reads is there, and the watcher, or the feeder, has acquired that.
#pragma once
#include "isa/device/block.cuh"
#include "isa/device/plan.cuh"

static_assert(BATCH % 32 == 0, "warps share the seats in pairs of blocks of 8");
static_assert(!WIDE, "a stretch needs elements of 16 bits");
constexpr int SEAT_BLOCKS = BATCH / 8;
constexpr int FRAGMENT_ROW_BYTES = BATCH * 32;  // 16 columns of x of every seat
constexpr int GROUP_TILES = 8, GROUP_ROWS = GROUP_TILES * TILE_ROWS;
constexpr int SLOT_FRAGMENTS = SLOT_BYTES / (GROUP_TILES * FRAGMENT_BYTES + FRAGMENT_ROW_BYTES);  // of a run, at most
constexpr int TILE_STRIDE = SLOT_FRAGMENTS * FRAGMENT_BYTES, SLOT_X = GROUP_TILES * TILE_STRIDE;  // a slot: a run of each tile, then its x

// A value's first byte: packets are of 4 bytes.
__device__ __forceinline__ uint8_t* value(const Block& b, int buffer) {
  return reinterpret_cast<uint8_t*>(b.p.arena) + 4ull * reinterpret_cast<const uint32_t*>(b.shared + BUFFERS_OFFSET)[buffer];
}
// Where columns k to k + 3 of x (k a multiple of 4) of a seat lie: the two B registers of a lane.
__device__ __forceinline__ int x_at(int k, int seat) {
  return (k >> 4) * FRAGMENT_ROW_BYTES + (seat >> 4) * 512 + ((seat & 7) * 4 + ((k & 15) >> 2)) * 16 + ((seat >> 3) & 1) * 8;
}
// Element `row` of a seat in share `share` of a product's sums, of a matrix of `rows` rows.
__device__ __forceinline__ uint64_t sum_at(int share, int rows, int seat, int row) {
  const int groups = (rows + GROUP_ROWS - 1) / GROUP_ROWS;
  return ((uint64_t)(share * groups + row / GROUP_ROWS) * BATCH + seat) * GROUP_ROWS + row % GROUP_ROWS;
}

__device__ __forceinline__ void add_to(float4& sum, const float4& v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; }
// Rows `row` to row + 3 of a seat: shares of the product's sums added in order. All are asked for before the first is added.
__device__ __forceinline__ float4 added_shares(const float* sums, int shares, int rows, int seat, int row) {
  float4 v[MOST_SHARES];
#pragma unroll
  for (int share = 0; share < MOST_SHARES; ++share)
    v[share] = share < shares ? __ldcg(reinterpret_cast<const float4*>(sums + sum_at(share, rows, seat, row))) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int share = 1; share < MOST_SHARES; ++share)
    if (share < shares) add_to(v[0], v[share]);
  return v[0];
}

// All consumers have published: whoever acquires the counter sees it.
__device__ __forceinline__ void release_done(Consumer& c, uint16_t counter) {
  c.meet();
  if (c.warp == 0 && c.lane == 0 && counter != NONE) add_release(c.b.counter(counter), 1);
}

// Run r of a tile (isa.stretch.runs): `count` fragments from fragment `first` of K on, at byte `offset` of the tile.
template <class P>
struct Run {
  static constexpr int WHOLE = (P::CHUNKS - 1) * CONSUMER_WARPS;  // runs before the last chunk
  static constexpr bool UNIFORM = P::HIGH_WARPS == 0 && P::LAST_LOW == P::PER_CHUNK;
  int first, count, offset;

  __device__ __forceinline__ explicit Run(int r) {
    const bool is_last = r >= WHOLE;
    const int chunk = is_last ? P::CHUNKS - 1 : r / CONSUMER_WARPS, warp = is_last ? r - WHOLE : r % CONSUMER_WARPS;
    const int per = is_last ? P::LAST_LOW : P::PER_CHUNK, more = is_last ? min_of(warp, P::HIGH_WARPS) : 0;
    first = warp * P::LOW + min_of(warp, P::HIGH_WARPS) + chunk * P::PER_CHUNK;
    count = UNIFORM ? P::PER_CHUNK : per + (is_last && warp < P::HIGH_WARPS);
    offset = (chunk * CONSUMER_WARPS * P::PER_CHUNK + warp * per + more) * FRAGMENT_BYTES;
  }
};

// The feeder's side of a product: run after run of each tile, and the x that goes with it. Weights depend on nothing: as many runs of them as the
// ring holds are asked for before x is there.
template <class P, class Task>
struct GroupFeed {
  Feeder& f;
  const Task& task;
  const uint32_t* places;  // of the tiles, in fragments
  const int lane;
  const uint8_t *tile, *x;  // the lane's tile, where each lane copies one
  uint32_t slot;            // whose x is asked for next
  int run;                  // the run in it
  bool open = false;        // x is there

  __device__ __forceinline__ GroupFeed(Feeder& f, const Task& task)
      : f(f), task(task),
        places(reinterpret_cast<const uint32_t*>(f.b.shared + PLACES_OFFSET) + f.products++ * GROUP_TILES),  // a launch is one stretch
        lane(threadIdx.x & 31), tile(tile_at(lane % GROUP_TILES)), x(value(f.b, task.x_buf)), slot(f.slot), run(task.run0) {}

  __device__ __forceinline__ const uint8_t* tile_at(int i) const {
    return reinterpret_cast<const uint8_t*>(f.b.p.weights) + (uint64_t)places[i] * FRAGMENT_BYTES;
  }
  __device__ __forceinline__ void copy_weights(const Run<P>& r) {
    const uint32_t bytes = r.count * FRAGMENT_BYTES;
    Barrier& full = f.b.barriers().full[f.slot];
    uint8_t* to = f.b.stage(f.slot);
    begin_copies(full, task.tiles * bytes + r.count * FRAGMENT_ROW_BYTES);
    __syncwarp();
    if constexpr (PIECE_A_LANE) {
      if (lane < task.tiles) copy_piece(full, to + lane * TILE_STRIDE, tile + r.offset, bytes);
    } else {
#pragma unroll 1
      for (int i = 0; i < task.tiles; ++i) copy_piece(full, to + i * TILE_STRIDE, tile_at(i) + r.offset, bytes);
    }
  }
  // x of the runs before `stop` whose x has not been asked for.
  __device__ __forceinline__ void copy_x(int stop) {
#pragma unroll 1
    for (; run < stop; ++run) {
      const Run<P> r(run);
      Barrier& full = f.b.barriers().full[slot];
      if (!PIECE_A_LANE || lane == 0) copy_piece(full, f.b.stage(slot) + SLOT_X, x + (uint64_t)r.first * FRAGMENT_ROW_BYTES, r.count * FRAGMENT_ROW_BYTES);
      end_copies(full);
      if (++slot == STAGES) slot = 0;
    }
  }
  // The launch is being aborted. The barriers of the runs before `stop` count the bytes of their x too, and the block must not end before they have
  // come: whatever lies there is copied.
  __device__ __forceinline__ bool give_up(int stop) {
    copy_x(stop);
    return false;
  }
  // Looks whether all of x has been released, or waits for it: false when the launch is being aborted.
  __device__ __forceinline__ bool look(const Token& token, bool must) {
    const uint32_t* counter = f.b.counter(task.wait_counter);
    const uint32_t threshold = task.wait_count * token.epoch;
    bool here = false;
    if (must) {
      if (!f.wait(WAIT_COUNTER, [=] { return reached(load_acquire(counter), threshold); })) return false;
      here = true;
    } else {
      here = f.here([=] { return reached(load_acquire(counter), threshold); });
    }
    if (here) order_copies();
    open = here;
    return true;
  }
};
template <int COLUMNS, int FLAGS, class Task>
__device__ __forceinline__ bool stream_group(Feeder& f, const Task& task, const Token& token) {
  using P = Plan<COLUMNS, FLAGS>;
  static_assert(P::PER_CHUNK <= SLOT_FRAGMENTS, "a slot holds a run of each tile of a group");
  GroupFeed<P, Task> feed(f, task);
  const int stop = task.run0 + task.runs;
#pragma unroll 1
  for (int r = task.run0; r < stop; ++r) {
    if (!feed.open && !feed.look(token, r - feed.run == INFLIGHT)) return feed.give_up(r);
    if (feed.open) feed.copy_x(r);
    if (!f.wait_slot()) return feed.give_up(r);
    feed.copy_weights(Run<P>(r));
    if (feed.open) feed.copy_x(r + 1);
    f.started();
  }
  if (!feed.open && !feed.look(token, true)) return feed.give_up(stop);
  feed.copy_x(stop);
  return true;
}

// The consumers' side: a warp has two neighbouring tiles of the group and, where there are warps enough, half of the seats.
struct GroupSums {
  static constexpr int PARTS = CONSUMER_WARPS / 4, BLOCKS = SEAT_BLOCKS / PARTS;
  static_assert(CONSUMER_WARPS % 4 == 0 && BLOCKS % 2 == 0, "four pairs of tiles, and pairs of blocks of seats");
  float acc[2][BLOCKS][4];
  const int tile, block;  // the first ones of the warp

  __device__ __forceinline__ explicit GroupSums(int warp) : tile(warp / PARTS * 2), block(warp % PARTS * BLOCKS) {
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS * 4; ++i) acc[i / (4 * BLOCKS)][i / 4 % BLOCKS][i % 4] = 0.f;
  }
  // A fragment of each of the two tiles, and x of the same columns.
  struct Operands {
    uint4 a, b, x[BLOCKS / 2];
    // Returns words that depend on all that was read.
    __device__ __forceinline__ uint32_t load(const uint8_t* w, const uint8_t* from) {
      a = *reinterpret_cast<const uint4*>(w), b = *reinterpret_cast<const uint4*>(w + TILE_STRIDE);
      uint32_t read = a.x | b.x;
#pragma unroll
      for (int i = 0; i < BLOCKS / 2; ++i) {
        x[i] = *reinterpret_cast<const uint4*>(from + i * 512);
        read |= x[i].x;
      }
      return read;
    }
  };
  // Fragment j of the run in a slot.
  __device__ __forceinline__ uint32_t load(Operands& o, const uint8_t* slot, int j, int lane) const {
    return o.load(slot + tile * TILE_STRIDE + j * FRAGMENT_BYTES + lane * 16, slot + SLOT_X + j * FRAGMENT_ROW_BYTES + block * 256 + lane * 16);
  }
  __device__ __forceinline__ void add(const Operands& o) {
#pragma unroll
    for (int i = 0; i < BLOCKS / 2; ++i) {
      multiply(acc[0][2 * i], o.a, o.x[i].x, o.x[i].y);
      multiply(acc[1][2 * i], o.b, o.x[i].x, o.x[i].y);
      multiply(acc[0][2 * i + 1], o.a, o.x[i].z, o.x[i].w);
      multiply(acc[1][2 * i + 1], o.b, o.x[i].z, o.x[i].w);
    }
  }
  // visit(tile of the group, seat, sums): lane (g, t) has rows g and g + 8 of seats `seat` and `seat` + 1: sums[0] and [1], then [2] and [3].
  template <class Visit>
  __device__ __forceinline__ void each(int lane, Visit visit) const {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < BLOCKS; ++i) visit(tile + m, (block + i) * 8 + (lane & 3) * 2, acc[m][i]);
  }
};

// The operands of a fragment are asked for before those of the one before are multiplied, those of a run's first one before the last of the
// run before. Fragments go in pairs, each with registers of its own; the last of an odd run hands on to the first of the next.
template <int COLUMNS, int FLAGS, class Task>
__device__ __forceinline__ void multiply_group(Consumer& c, const Task& task, GroupSums& sums) {
  using P = Plan<COLUMNS, FLAGS>;
  constexpr bool EVEN = P::PER_CHUNK % 2 == 0 && P::HIGH_WARPS == 0 && P::LAST_LOW % 2 == 0;
  constexpr int UNROLLED = Run<P>::UNIFORM && P::PER_CHUNK <= 4 ? 2 : 1;  // longer runs would spill
  const int stop = task.run0 + task.runs;
  GroupSums::Operands now, next;
  const uint8_t* slot = c.wait_chunk();
  uint32_t read = sums.load(now, slot, 0, c.lane);
#pragma unroll 1
  for (int r = task.run0; r < stop; ++r) {
    const int count = Run<P>::UNIFORM ? P::PER_CHUNK : Run<P>(r).count;
#pragma unroll UNROLLED
    for (int j = 0; j + 1 < count; j += 2) {
      read |= sums.load(next, slot, j + 1, c.lane);
      sums.add(now);
      if (j + 2 < count) read |= sums.load(now, slot, j + 2, c.lane);
      else {
        c.release_chunk(read);
        if (r + 1 < stop) read = sums.load(now, slot = c.wait_chunk(), 0, c.lane);
      }
      sums.add(next);
    }
    if (!EVEN && count % 2) {
      c.release_chunk(read);
      if (r + 1 < stop) read = sums.load(next, slot = c.wait_chunk(), 0, c.lane);
      else next = {};  // registers that a path leaves as they were would be kept for good
      sums.add(now);
      now = next;
    }
  }
}

// Every compiled shape: a product's feeder and consumer parts.
template <class Task>
__device__ __forceinline__ bool stream_stretch(Feeder& f, const Task& task, const Token& token) {
  switch (task.shape) {
#define SHAPE_CASE(index, columns, flags) \
  case index: return stream_group<columns, flags>(f, task, token);
    FOR_EACH_SHAPE(SHAPE_CASE)
#undef SHAPE_CASE
  }
  return true;
}
template <class Task>
__device__ __forceinline__ void multiply_stretch(Consumer& c, const Task& task, GroupSums& sums) {
  switch (task.shape) {
#define SHAPE_CASE(index, columns, flags) \
  case index: multiply_group<columns, flags>(c, task, sums); return;
    FOR_EACH_SHAPE(SHAPE_CASE)
#undef SHAPE_CASE
  }
}
