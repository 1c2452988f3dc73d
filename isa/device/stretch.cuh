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

// Four rows of a seat, N times: quad i from row `row(i)` on, shares of the product's sums added in order. All are asked for before the first is added.
template <int N, class Row>
__device__ __forceinline__ void add_shares(float4 (&total)[N], const float* sums, int shares, int rows, int seat, Row row) {
  float4 v[N][MOST_SHARES];
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int share = 0; share < MOST_SHARES; ++share)
      if (share < shares) v[i][share] = __ldcg(reinterpret_cast<const float4*>(sums + sum_at(share, rows, seat, row(i))));
#pragma unroll
  for (int i = 0; i < N; ++i) {
    total[i] = v[i][0];
#pragma unroll
    for (int share = 1; share < MOST_SHARES; ++share)
      if (share < shares) total[i].x += v[i][share].x, total[i].y += v[i][share].y, total[i].z += v[i][share].z, total[i].w += v[i][share].w;
  }
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

// The feeder's side of a product: run after run of each tile, and the x that goes with it.
template <int COLUMNS, int FLAGS, class Task>
__device__ __forceinline__ bool stream_group(Feeder& f, const Task& task, const Token& token) {
  using P = Plan<COLUMNS, FLAGS>;
  static_assert(P::PER_CHUNK <= SLOT_FRAGMENTS, "a slot holds a run of each tile of a group");
  const Block& b = f.b;
  const uint32_t* counter = b.counter(task.wait_counter);
  const uint32_t threshold = task.wait_count * token.epoch;
  if (!f.wait(WAIT_COUNTER, [=] { return reached(load_acquire(counter), threshold); })) return false;
  order_copies();
  const uint8_t *weights = reinterpret_cast<const uint8_t*>(b.p.weights), *x = value(b, task.x_buf);
  const uint32_t* places = reinterpret_cast<const uint32_t*>(b.shared + PLACES_OFFSET) + f.products++ * GROUP_TILES;  // a launch is one stretch
  const int tiles = task.tiles;
#pragma unroll 1
  for (int r = task.run0; r < task.run0 + task.runs; ++r) {
    const Run<P> run(r);
    const uint32_t tile_bytes = run.count * FRAGMENT_BYTES, x_bytes = run.count * FRAGMENT_ROW_BYTES;
    if (!f.wait_slot()) return false;
    Barrier& full = b.barriers().full[f.slot];
    uint8_t* to = b.stage(f.slot);
    begin_copies(full, tiles * tile_bytes + x_bytes);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile)
      copy_piece(full, to + tile * TILE_STRIDE, weights + (uint64_t)places[tile] * FRAGMENT_BYTES + run.offset, tile_bytes);
    copy_piece(full, to + SLOT_X, x + (uint64_t)run.first * FRAGMENT_ROW_BYTES, x_bytes);
    end_copies(full);
    f.started();
  }
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
  // Adds fragment j of the run in a slot; returns words that depend on all that was read.
  __device__ __forceinline__ uint32_t add(const uint8_t* slot, int j, int lane) {
    const uint8_t* w = slot + tile * TILE_STRIDE + j * FRAGMENT_BYTES + lane * 16;
    const uint8_t* x = slot + SLOT_X + j * FRAGMENT_ROW_BYTES + block * 256 + lane * 16;
    const uint4 a = *reinterpret_cast<const uint4*>(w), b = *reinterpret_cast<const uint4*>(w + TILE_STRIDE);
    uint32_t read = a.x | b.x;
#pragma unroll
    for (int i = 0; i < BLOCKS; i += 2) {
      const uint4 v = *reinterpret_cast<const uint4*>(x + i * 256);
      read |= v.x;
      multiply(acc[0][i], a, v.x, v.y);
      multiply(acc[1][i], b, v.x, v.y);
      multiply(acc[0][i + 1], a, v.z, v.w);
      multiply(acc[1][i + 1], b, v.z, v.w);
    }
    return read;
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

template <int COLUMNS, int FLAGS, class Task>
__device__ __forceinline__ void multiply_group(Consumer& c, const Task& task, GroupSums& sums) {
  using P = Plan<COLUMNS, FLAGS>;
#pragma unroll 1
  for (int r = task.run0; r < task.run0 + task.runs; ++r) {
    const uint8_t* slot = c.wait_chunk();
    uint32_t read = 0;
    if constexpr (Run<P>::UNIFORM) {
#pragma unroll 2
      for (int j = 0; j < P::PER_CHUNK; ++j) read |= sums.add(slot, j, c.lane);
    } else {
      const int count = Run<P>(r).count;
#pragma unroll 1
      for (int j = 0; j < count; ++j) read |= sums.add(slot, j, c.lane);
    }
    c.release_chunk(read);
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
