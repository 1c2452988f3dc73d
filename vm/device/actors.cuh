// The four kinds of actor: each walks the SM's tasks of every token of the launch, in its own time.
#pragma once
#include "vm/device/dispatch.cuh"

// A build for tests can make one actor of SM 0 stop at its first task of the last token, as if the program were wrong.
__device__ __forceinline__ bool stuck_here(uint32_t actor, const Abort& a, const Params& p) {
  return HANG_ACTOR == (int)actor && a.sm == 0 && a.token + 1 == p.steps;
}
__device__ __forceinline__ bool wait_forever(const Abort& a) {
  return poll_until(a, 0, [] { return false; });
}

__device__ __forceinline__ void run_consumer(const Block& b, int warp, int lane) {
  Consumer c(b, warp, lane);
  for (uint32_t step = 0; step < b.p.steps; ++step) {
    const Token token(b.p, step);
    c.abort.token = step;
    for (uint32_t i = 0; i < b.tasks; ++i) {
      ++c.sequence;
      c.abort.task = i;
      TRACE(trace_task(b.sm, i, step);)
      if (stuck_here(CONSUMER, c.abort, b.p) && warp == 0 && !wait_forever(c.abort)) leave();
      c.warp = opaque(c.warp);
      c.lane = opaque(c.lane);
      consume(c, b.task(i), token);
    }
    __syncwarp();
    if (lane == 0) add_shared_release(&b.barriers().finished, 1);
  }
}

// Older KV rows are streamed only after the end of the token that wrote the newest of them, if this launch wrote it.
__device__ __forceinline__ bool wait_old_rows(const Feeder& f, const Token& token) {
  if (token.step < KV_LAG) return true;
  const uint32_t* ended = f.b.counter(COUNTERS);
  const uint32_t threshold = f.b.p.kv_writers * (token.epoch - KV_LAG);
  if (!f.wait(WAIT_TOKEN_END, [=] { return reached(load_acquire(ended), threshold); })) return false;
  order_copies();
  return true;
}

__device__ __forceinline__ bool feed(Feeder& f) {
  const Block& b = f.b;
  for (uint32_t step = 0; step < b.p.steps; ++step) {
    const Token token(b.p, step);
    f.abort.token = step;
    const uint8_t* at = reinterpret_cast<const uint8_t*>(b.p.weights) + b.weights;
    bool rows_waited = false;
    for (uint32_t i = 0; i < b.entries; ++i) {
      const int index = b.entry(i);
      const uint8_t* task = b.task(index);
      f.abort.task = index;
      TRACE(trace_task(b.sm, index, step);)
      if (stuck_here(FEEDER, f.abort, b.p) && !f.wait(0, [] { return false; })) return false;
      if (streams_rows(task) && !rows_waited) {
        if (!wait_old_rows(f, token)) return false;
        rows_waited = true;
      }
      if (!stream(f, task, at, token)) return false;
    }
  }
  return true;
}
__device__ __forceinline__ void run_feeder(const Block& b) {
  Feeder f(b);
  feed(f);
  f.drain();
}

__device__ __forceinline__ void run_storer(const Block& b, int lane) {
  Storer s(b, lane);
  for (uint32_t step = 0; step < b.p.steps; ++step) {
    const Token token(b.p, step);
    s.abort.token = step;
    for (uint32_t i = 0; i < b.tasks; ++i) {
      const uint8_t* task = b.task(i);
      if (!stored(task)) continue;
      s.abort.task = i;
      TRACE(trace_task(b.sm, i, step);)
      if (stuck_here(STORER, s.abort, b.p) && !wait_forever(s.abort)) leave();
      store(s, task, token);
      __syncwarp();
      const uint16_t counter = reinterpret_cast<const TaskHead*>(task)->done_counter;
      if (lane == 0 && counter != NONE) add_relaxed(b.counter(counter), 1);
    }
    if (lane == 0 && b.appends_rows) {
      const uint32_t* finished = &b.barriers().finished;
      const uint32_t all = CONSUMER_WARPS * (step + 1);
      wait_until(s.abort, WAIT_BARRIER, [=] { return reached(load_shared_acquire(finished), all); });
      add_release(b.counter(COUNTERS), 1);
    }
    __syncwarp();
  }
  if (HANG_ACTOR == LAUNCH_END && b.sm == 0 && !wait_forever(s.abort)) leave();
}

__device__ __forceinline__ uint32_t load_host_word(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void run_watcher(const Block& b) {
  Abort abort{reinterpret_cast<uint32_t*>(b.p.abort), b.p.spin_limit, WATCHER, b.sm, 0, 0};
  const uint32_t* host = reinterpret_cast<const uint32_t*>(b.p.host_abort);
  uint32_t sequence = 0;
  for (uint32_t step = 0; step < b.p.steps; ++step) {
    const Token token(b.p, step);
    abort.token = step;
    if (b.sm == 0 && host && load_host_word(host)) raise_abort(abort, ABORT_HOST, 0);
    for (uint32_t i = 0; i < b.tasks; ++i) {
      const TaskHead head = *reinterpret_cast<const TaskHead*>(b.task(i));
      abort.task = i;
      TRACE(trace_task(b.sm, i, step);)
      const bool before = carried(head.op);
      if (stuck_here(WATCHER, abort, b.p) && !wait_forever(abort)) leave();
      if (head.wait_counter != NONE && !(before && step == 0)) {
        const uint32_t* counter = b.counter(head.wait_counter);
#if GATED
        // Counters are all that orders: every arrival is waited for, and what came before it is there for who is released.
        const uint32_t threshold = head.wait_count * token.epoch;
        wait_until(abort, WAIT_COUNTER, [=] { return reached(load_acquire(counter), threshold); });
#else
        // Counters order nothing, so the last arrivals need not be waited for: consumers find their values by the tags.
        const uint32_t missing = head.wait_count * RELEASE_EARLY / 32;
        const uint32_t threshold = head.wait_count * (token.epoch - before) - missing;
        wait_until(abort, WAIT_COUNTER, [=] {
          if (reached(load_relaxed(counter), threshold)) return true;
          if (POLL_SLEEP_NS) __nanosleep(POLL_SLEEP_NS);
          return false;
        });
#endif
      }
      store_shared_release(&b.barriers().released, ++sequence);
    }
  }
}
