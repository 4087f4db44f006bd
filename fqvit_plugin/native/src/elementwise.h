// Steps without products: the image's codes, moves of bytes, residual sums, tables, means.
#pragma once

#include "gemm.h"

namespace fq {

static void run(const Quantize& g, Job& job) {
  const float* x = job.memory.image;
  uint8_t* y = job.memory.at(g.y);
  const float scale = static_cast<float>(g.scale), zero = static_cast<float>(g.zero);
  const float low = static_cast<float>(g.low), high = static_cast<float>(g.high);
  job.share(g.size * job.memory.batch, 4096, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      float steps = std::nearbyint(x[i] / scale);  // halves to even
      steps = steps < low ? low : steps;
      steps = steps > high ? high : steps;
      y[i] = static_cast<uint8_t>(static_cast<int32_t>(steps + zero));
    }
  });
}

template <int RUN>
static void gather(const Gather& g, const uint8_t* x, uint8_t* y, int64_t from, int64_t to) {
  const int64_t run = RUN ? RUN : g.run;
  for (int64_t i = from; i < to; ++i) {
    int64_t image = i / g.runs, source = g.index[i % g.runs];
    if (source < 0)
      std::memset(y + i * run, static_cast<int>(g.fill), run);
    else
      std::memcpy(y + i * run, x + image * g.in_size + source, run);
  }
}

static void run(const Gather& g, Job& job) {
  const uint8_t* x = job.memory.at(g.x);
  uint8_t* y = job.memory.at(g.y);
  job.share(g.runs * job.memory.batch, 4096 / g.run + 1, [&](int64_t from, int64_t to) {
    switch (g.run) {
      case 1: return gather<1>(g, x, y, from, to);
      case 4: return gather<4>(g, x, y, from, to);
      case 16: return gather<16>(g, x, y, from, to);
      default: return gather<0>(g, x, y, from, to);
    }
  });
}

static void run(const Prepend& g, Job& job) {
  const uint8_t* x = job.memory.at(g.x);
  uint8_t* y = job.memory.at(g.y);
  int64_t before = g.size - g.in_size;
  job.share(job.memory.batch, 1, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      std::memcpy(y + b * g.size, g.tokens, before);
      std::memcpy(y + b * g.size + before, x + b * g.in_size, g.in_size);
    }
  });
}

static void run(const Add& g, Job& job) {
  const uint8_t *a = job.memory.at(g.a), *b = g.constant == nullptr ? job.memory.at(g.b) : g.constant;
  uint8_t* y = job.memory.at(g.y);
  vint low = spread(static_cast<int32_t>(g.sum.low)), high = spread(static_cast<int32_t>(g.sum.high));
  job.share(g.rows * job.memory.batch, 8, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const uint8_t *p = a + r * g.columns, *q = b + (g.constant == nullptr ? r : r % g.rows) * g.columns;
      for (int64_t c = 0; c < g.columns; c += LANES) {
        if (g.columns - c >= LANES) {
          store_bytes(y + r * g.columns + c, sum_codes(load_bytes(p + c), load_bytes(q + c), g.sum, c, low, high));
        } else {
          int n = static_cast<int>(g.columns - c);
          vint codes = sum_codes(load_bytes(p + c, n), load_bytes(q + c, n), g.sum, c, low, high);
          store_bytes(y + r * g.columns + c, codes, n);
        }
      }
      for (int64_t i = 0; i < g.sum.far.count; ++i) {
        const int64_t c = g.sum.far.channel[i];
        y[r * g.columns + c] = static_cast<uint8_t>(sum_of(p[c], q[c], g.sum, i));
      }
    }
  });
}

static void run(const Lookup& g, Job& job) {
  const uint8_t* x = job.memory.at(g.x);
  uint8_t* y = job.memory.at(g.y);
  job.share(g.size * job.memory.batch, 4096, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) y[i] = g.table[x[i]];
  });
}

static void run(const Mean& g, Job& job) {
  const uint8_t* x = job.memory.at(g.x);
  uint8_t* y = job.memory.at(g.y);
  vint low = spread(static_cast<int32_t>(g.requant.low)), high = spread(static_cast<int32_t>(g.requant.high));
  int64_t vectors = (g.columns + LANES - 1) / LANES;
  job.share(vectors * job.memory.batch, 8, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      int64_t image = i / vectors, c = i % vectors * LANES;
      int n = static_cast<int>(g.columns - c < LANES ? g.columns - c : LANES);
      vint total = spread(static_cast<int32_t>(g.start));
      for (int64_t r = 0; r < g.rows; ++r) total = add(total, load_bytes(x + (image * g.rows + r) * g.columns + c, n));
      store_bytes(y + image * g.columns + c, requantize(total, g.requant, c, low, high), n);
    }
  });
}

}  // namespace fq
