// filter_draw: the best score with noise among the tokens that the filters keep. All consumer warps of one SM.
//
// Which tokens are kept is known without sorting. The largest score of each tile, in registers, tells where tokens from some score on can lie,
// so that few tiles are looked at again. top-k: a histogram of scores, refined until the k-th is alone in its bin. top-p: the best candidate
// is kept if less than the share of the mass lies above it; else the best of those above it is the next candidate, and so on. That ends soon:
// a candidate is drawn by mass, so each failure leaves about half of the mass.
#pragma once
#include "isa/filter_head.cuh"

constexpr int HEAD_TILES = ceil_div(VOCAB, TILE_ROWS);
constexpr int LANE_TILES = ceil_div(HEAD_TILES, CONSUMER_THREADS * 4) * 4;  // tiles that a lane keeps, read 4 at a time
constexpr int QUEUE_TILES = 64, BINS = 256, SHARED_WORDS = 16;  // of isa/filter_draw.py
constexpr int TILES_AT_ONCE = 16;
__device__ __forceinline__ float no_score() { return -__int_as_float(0x7f800000); }

struct FilterScratch {
  uint32_t bins[BINS];
  uint32_t lines[2][CONSUMER_WARPS][SHARED_WORDS];  // rounds alternate: a warp writes a line again only after all have read it
  uint32_t queues[CONSUMER_WARPS][QUEUE_TILES];
};
static_assert(sizeof(FilterScratch) <= SCRATCH_BYTES, "the scratch of filter_draw must be what isa/filter_draw.py asks for");

// A token with its score, with and without noise.
struct Candidate {
  float noisy = no_score(), score = no_score();
  int row = 0x7fffffff;
  // The better of two: larger with noise, lower row on ties.
  __device__ __forceinline__ void keep(const Candidate& other) {
    if (other.noisy > noisy || (other.noisy == noisy && other.row < row)) *this = other;
  }
  __device__ __forceinline__ uint64_t place() const { return (uint64_t)key_of(score) << 32 | (uint32_t)row; }  // in the order of (score, token)
};

// What lies from some place on: its mass, and the best candidate that min-p keeps.
struct Above {
  uint64_t mass = 0;
  Candidate best;
};

__device__ __forceinline__ uint64_t shuffled(uint64_t v, int d) {
  return (uint64_t)__shfl_xor_sync(~0u, (uint32_t)(v >> 32), d) << 32 | __shfl_xor_sync(~0u, (uint32_t)v, d);
}
__device__ __forceinline__ Candidate shuffled(const Candidate& v, int d) {
  Candidate other;
  other.noisy = __shfl_xor_sync(~0u, v.noisy, d);
  other.score = __shfl_xor_sync(~0u, v.score, d);
  other.row = __shfl_xor_sync(~0u, v.row, d);
  return other;
}

struct Filter {
  Consumer& c;
  const Token& token;
  const uint64_t* in;
  const Expected want;
  FilterScratch& shared;
  const float min_p;
  int line = 0;
  float largest = no_score();  // of all scores
  float* const tops;  // largest score of each of this lane's tiles, minus infinity where there is none

  __device__ __forceinline__ Filter(Consumer& c, const FilterDrawTask& task, const Token& token, float* tops)
      : c(c), token(token), in(c.b.buffer(task.in_buf)), want(token.expect(task.in_tag)),
        shared(*reinterpret_cast<FilterScratch*>(c.b.scratch())), min_p(as_float(c.b.p.min_p)), tops(tops) {}

  // Lanes 2 i and 2 i + 1 read the two halves of a summary, which is one sector; the even lane keeps the first of two tiles, the odd one the second.
  __device__ __forceinline__ int read_tile(int turn) const { return (turn * CONSUMER_WARPS + c.warp) * 16 + (c.lane >> 1); }
  __device__ __forceinline__ int own_tile(int i) const { return read_tile(2 * i + (c.lane & 1)); }

  // ---- what the warps tell each other; every warp calls these in the same order

  __device__ __forceinline__ Above all_of(Above mine) {
#pragma unroll
    for (int d = 16; d; d >>= 1) {
      mine.mass += shuffled(mine.mass, d);
      mine.best.keep(shuffled(mine.best, d));
    }
    uint32_t* own = shared.lines[line][c.warp];
    if (c.lane == 0) {
      own[0] = (uint32_t)mine.mass;
      own[1] = (uint32_t)(mine.mass >> 32);
      own[2] = as_bits(mine.best.noisy);
      own[3] = as_bits(mine.best.score);
      own[4] = (uint32_t)mine.best.row;
    }
    c.meet();
    Above all;
#pragma unroll 1
    for (int w = 0; w < CONSUMER_WARPS; ++w) {
      const uint32_t* other = shared.lines[line][w];
      all.mass += (uint64_t)other[1] << 32 | other[0];
      Candidate best;
      best.noisy = as_float(other[2]);
      best.score = as_float(other[3]);
      best.row = (int)other[4];
      all.best.keep(best);
    }
    line ^= 1;
    return all;
  }
  // The largest and the smallest of each lane's two values.
  __device__ __forceinline__ void range_of(float& high, float& low) {
#pragma unroll
    for (int d = 16; d; d >>= 1) {
      high = fmaxf(high, __shfl_xor_sync(~0u, high, d));
      low = fminf(low, __shfl_xor_sync(~0u, low, d));
    }
    uint32_t* own = shared.lines[line][c.warp];
    if (c.lane == 0) {
      own[0] = as_bits(high);
      own[1] = as_bits(low);
    }
    c.meet();
#pragma unroll 1
    for (int w = 0; w < CONSUMER_WARPS; ++w) {
      high = fmaxf(high, as_float(shared.lines[line][w][0]));
      low = fminf(low, as_float(shared.lines[line][w][1]));
    }
    line ^= 1;
  }

  // ---- summaries

  __device__ __forceinline__ const uint64_t* summary(int tile, int half) const {
    return in + min_of(tile, HEAD_TILES - 1) * TILE_PACKETS + ROW_PACKETS * TILE_ROWS + 2 * half;
  }
  // Reads all of them: `tops`, `largest`, the smallest of all tops, and the best candidate, whose score is not yet known.
  __device__ __forceinline__ Candidate read_summaries(float& least_top) {
    Above mine;
    float high = no_score(), low = -no_score();
    const bool odd = c.lane & 1;
#pragma unroll 1
    for (int i = 0; i < LANE_TILES; i += 4) {
      uint4 v[8];
      c.read_all(v, want, [&](int j) { return summary(read_tile(2 * i + j), odd); });
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const float second = __shfl_xor_sync(~0u, as_float(v[j + 1].x), 1);
        const bool exists = own_tile(i + j / 2) < HEAD_TILES;
        const float top = odd ? second : as_float(v[j].x);
        tops[i + j / 2] = exists ? top : no_score();
        high = fmaxf(high, tops[i + j / 2]);
        low = fminf(low, exists ? top : low);
#pragma unroll
        for (int k = j; odd && k < j + 2; ++k) {  // the last tile again changes nothing
          Candidate found;
          found.noisy = as_float(v[k].x);
          found.row = (int)v[k].z;
          mine.best.keep(found);
        }
      }
    }
    range_of(high, low);
    largest = high;
    least_top = low;
    return all_of(mine).best;
  }
  // The mass of everything, by tiles.
  __device__ __forceinline__ uint64_t total_mass() {
    Above mine;
#pragma unroll 1
    for (int first = c.warp * 32 + c.lane; first < HEAD_TILES; first += CONSUMER_THREADS * 4) {
      uint4 v[4];
      c.read_all(v, want, [&](int j) { return summary(first + CONSUMER_THREADS * j, 0); });
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + CONSUMER_THREADS * j < HEAD_TILES) mine.mass += mass_of(difference(as_float(v[j].x), largest), as_float(v[j].z));
    }
    __syncwarp();
    return all_of(mine).mass;
  }

  // ---- tokens

  // Calls `visit(score, noisy, row)` for every token of the tiles whose largest score is at least `least`.
  template <class Visit>
  __device__ __forceinline__ void for_tokens(float least, Visit visit) {
    uint32_t* queue = shared.queues[c.warp];
    int queued = 0;
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < LANE_TILES; first += 32) {
      uint32_t left = 0;  // of this lane's next 32 tiles
#pragma unroll 4
      for (int i = 0; i < min_of(32, LANE_TILES - first); ++i) left |= (uint32_t)(tops[first + i] >= least) << i;
      for (;;) {
        const uint32_t found = __ballot_sync(~0u, left != 0);
        if (left) queue[queued + __popc(found & ((1u << c.lane) - 1))] = own_tile(first + __ffs(left) - 1);
        left &= left - 1;
        queued += __popc(found);
        __syncwarp();
        const bool last = !found && first + 32 >= LANE_TILES;
        while (queued >= TILES_AT_ONCE || (last && queued)) {
          const int count = min_of(queued, TILES_AT_ONCE);
          queued -= count;
          look_at(queue + queued, count, visit);
        }
        if (!found) break;
      }
    }
  }
  // A half warp for each of up to 16 tiles.
  template <class Visit>
  __device__ __forceinline__ void look_at(const uint32_t* tiles, int count, Visit visit) {
    uint4 v[TILES_AT_ONCE / 2];
    const int half = c.lane >> 4, row = c.lane & 15;
    c.read_all(v, want, [&](int j) { return in + tiles[min_of(2 * j + half, count - 1)] * TILE_PACKETS + ROW_PACKETS * row; });
#pragma unroll
    for (int j = 0; j < TILES_AT_ONCE / 2; ++j) {
      const int r = (int)tiles[min_of(2 * j + half, count - 1)] * TILE_ROWS + row;
      if (2 * j + half < count && r < VOCAB) visit(as_float(v[j].x), as_float(v[j].z), r);
    }
    __syncwarp();  // the queue may be written again
  }

  // Everything from a place on.
  __device__ __forceinline__ Above above(uint64_t place) {
    Above mine;
    for_tokens(score_of_key((uint32_t)(place >> 32)), [&](float score, float noisy, int row) {
      Candidate found;
      found.noisy = noisy;
      found.score = score;
      found.row = row;
      if (found.place() < place) return;
      const float below = difference(score, largest);
      mine.mass += mass_of(below);
      if (exponential(below) >= min_p) mine.best.keep(found);
    });
    return all_of(mine);
  }

  // ---- top-k

  // Bin `bin` of the histogram holds the `need`-th from above; `more` are in the bins above it, `inside` in it.
  struct Bin {
    uint32_t bin, more, inside;
  };
  __device__ __forceinline__ Bin find_bin(uint32_t need) {
    uint32_t own[BINS / 32], sum = 0;
#pragma unroll
    for (int i = 0; i < BINS / 32; ++i) sum += own[i] = shared.bins[BINS - 1 - (c.lane * (BINS / 32) + i)];
    uint32_t upto = sum;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const uint32_t other = __shfl_up_sync(~0u, upto, d);
      if (c.lane >= d) upto += other;
    }
    const int lane = __ffs(__ballot_sync(~0u, upto >= need)) - 1;
    Bin found{0, upto - sum, 0};
    bool passed = false;
#pragma unroll
    for (int i = 0; i < BINS / 32; ++i) {
      if (passed) continue;
      found.bin = BINS - 1 - (c.lane * (BINS / 32) + i);
      found.inside = own[i];
      passed = found.more + own[i] >= need;
      if (!passed) found.more += own[i];
    }
    return {__shfl_sync(~0u, found.bin, lane), __shfl_sync(~0u, found.more, lane), __shfl_sync(~0u, found.inside, lane)};
  }
  template <class Count>
  __device__ __forceinline__ Bin histogram(uint32_t need, Count count) {
    for (int i = c.warp * 32 + c.lane; i < BINS; i += CONSUMER_THREADS) shared.bins[i] = 0;
    c.meet();
    count();
    c.meet();
    const Bin found = find_bin(need);
    c.meet();  // all have read the bins
    return found;
  }
  static __device__ __forceinline__ int shift_of(uint32_t span) { return max_of(0, 24 - __clz((int)span)); }  // span >> shift is below BINS

  // The score of the k-th largest token, or one below it above which there are no more than k. There are more than k tokens.
  __device__ __forceinline__ float kth_score(uint32_t k, float least_top) {
    uint32_t low = key_of(-FINITE), high = key_of(largest), more = 0;
    if (k <= HEAD_TILES) {  // k tiles whose largest scores are not below a bin: k tokens
      const uint32_t start = key_of(least_top);
      const int shift = shift_of(high - start);
      low = start + (histogram(k, [&] {
#pragma unroll 1
              for (int i = 0; i < LANE_TILES; ++i)
                if (tops[i] != no_score()) count_shared(&shared.bins[(key_of(tops[i]) - start) >> shift]);
            }).bin << shift);
    }
    for (;;) {
      const int shift = shift_of(high - low);
      const Bin found = histogram(k - more, [&] {
        for_tokens(score_of_key(low), [&](float score, float, int) {
          const uint32_t key = key_of(score);
          if (key >= low && key <= high) count_shared(&shared.bins[(key - low) >> shift]);
        });
      });
      more += found.more;
      low += found.bin << shift;
      if (shift == 0 || more + found.inside == k) return score_of_key(low);
      const uint32_t span = (1u << shift) - 1;
      if (high - low > span) high = low + span;
    }
  }

  // ---- the choice

  __device__ __forceinline__ int choose() {
    const Params& p = c.b.p;
    const bool some = p.top_k > 0 && p.top_k < VOCAB;
    float least_top;
    Candidate best = read_summaries(least_top);
    if (!some && p.removed_share == 0 && min_p == 0.f) return best.row;
    uint64_t mass = 0, place;
    bool known = !some;  // `best` is the best of those that top-k and min-p keep
    if (some) {
      place = (uint64_t)key_of(kth_score(p.top_k, least_top)) << 32;
    } else {
      if (p.removed_share != 0) mass = total_mass();
      best.score = as_float(c.read(in + best.row / TILE_ROWS * TILE_PACKETS + ROW_PACKETS * (best.row % TILE_ROWS), want).x);
      __syncwarp();
      known = exponential(difference(best.score, largest)) >= min_p;
      place = known ? best.place() + 1 : (uint64_t)key_of(fmaxf(sum_of(largest, as_float(p.least_score)), -FINITE)) << 32;
    }
    for (;;) {
      if (known && p.removed_share == 0) return best.row;
      const Above found = above(place);
      if (known && found.mass < mass - __umul64hi(mass, p.removed_share)) return best.row;
      if (some && !known) mass = found.mass;
      best = found.best;
      place = best.place() + 1;
      known = true;
    }
  }
};

__device__ __forceinline__ void consume_filter_draw(Consumer& c, const FilterDrawTask& task, const Token& token) {
  const Block& b = c.b;
  c.wait_released();
  c.meet();  // the scratch is everybody's from here on
  const int32_t stop = stop_token(b.p, c.lane);
  float tops[LANE_TILES];  // apart from the filter, so that the rest of it stays in registers
  const int row = Filter(c, task, token, tops).choose();
  c.meet();
  if (c.warp == 0) choose_token(c, row, stop, b.buffer(task.out_buf), token.tag(task.out_tag), token);
  c.arrive_done(task.done_counter);
}
