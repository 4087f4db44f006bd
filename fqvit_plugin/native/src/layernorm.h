// Integer LayerNorm of rows of bytes. Every number stays below 2**53, so that doubles hold it exactly; rows for which
// that cannot be said are computed in 64-bit integers.
#pragma once

#include "common.h"

namespace fq {

struct Moments {
  int64_t sum, squares;
};

// Adds channels from..to of a row to its moments; x holds them. u = byte * factor - center. WIDE: |u| is below 2**15
// (at most 2**22), and its squares are summed in doubles: 2**30 for each channel, so 2**53 holds them all.
template <bool WIDE>
static inline void add_moments(const Norm& g, const uint8_t* x, int64_t from, int64_t to, int32_t* u, Moments& m) {
  vint total = spread(int32_t{0}), squares = total;
  vreal wide = spread(0.0);
  int64_t c = from;
  x -= from;
  for (int block = 0; c + LANES <= to; c += LANES) {
    vint value = sub(multiply(load_bytes(x + c), load(g.factor + c)), load(g.center + c));
    store(u + c, value);
    total = add(total, value);
    if (WIDE) {
      vreal exact = to_real(value);
      wide = multiply_add(exact, exact, wide);
      continue;
    }
    squares = add(squares, multiply(value, value));
    if (++block == 64) {  // squares are below 2**25, so 64 of them fit
      m.squares += sum(squares);
      squares = spread(int32_t{0});
      block = 0;
    }
  }
  m.sum += sum(total);
  m.squares += WIDE ? static_cast<int64_t>(sum(wide)) : sum(squares);
  for (; c < to; ++c) {
    u[c] = x[c] * g.factor[c] - g.center[c];
    m.sum += u[c];
    m.squares += static_cast<int64_t>(u[c]) * u[c];
  }
  for (int64_t i = 0; i < g.far.count; ++i) {
    c = g.far.channel[i];
    if (c < from || c >= to || x[c] != g.far.end[i]) continue;
    const int64_t was = u[c], is = g.far.value[i];
    m.sum += is - was;
    m.squares += is * is - was * was;
    u[c] = static_cast<int32_t>(is);
  }
}

FQ_INLINE int64_t floor_sqrt(int64_t x) {
  int64_t root = static_cast<int64_t>(std::sqrt(static_cast<double>(x)));
  while (root * root > x) --root;
  while ((root + 1) * (root + 1) <= x) ++root;
  return root;
}

static inline void normalize_exactly(const Norm& g, const int32_t* u, int64_t total, int64_t reciprocal, uint8_t* y) {
  for (int64_t c = 0; c < g.channels; ++c) {
    int64_t x_hat = ((g.channels * u[c] - total) * reciprocal + (int64_t{1} << 28)) >> 29;
    int64_t code = ((x_hat * g.whole_gain[c] + g.whole_offset[c]) >> g.shifts[c]) + g.zero[c];
    y[c] = static_cast<uint8_t>(code < g.low ? g.low : (code > g.high ? g.high : code));
  }
}

static inline void normalize(const Norm& g, const Moments& m, const int32_t* u, uint8_t* y) {
  int64_t spread_of_row = g.channels * m.squares - m.sum * m.sum;
  int64_t variance = spread_of_row + g.guard;
  int64_t radicand = g.root_bits >= 0 ? variance << (2 * g.root_bits) : variance >> (-2 * g.root_bits);
  if (radicand > (int64_t{1} << 52)) radicand = int64_t{1} << 52;
  int64_t root = floor_sqrt(radicand);
  int64_t reciprocal = (int64_t{1} << (45 + g.root_bits)) / (root > 0 ? root : 1);
  // (C u - S)^2 <= C (C sum u^2 - S^2); with the reciprocal it must stay below 2**52
  double largest = static_cast<double>(g.channels) * static_cast<double>(spread_of_row), r = static_cast<double>(reciprocal);
  if (reciprocal >= (int64_t{1} << 53) || largest * r * r > 1.6e31) {
    normalize_exactly(g, u, m.sum, reciprocal, y);
    return;
  }
  vreal weight = spread(static_cast<double>(reciprocal) / (1 << 29)), half = spread(0.5);
  vint channels = spread(static_cast<int32_t>(g.channels)), total = spread(static_cast<int32_t>(m.sum));
  vint low = spread(static_cast<int32_t>(g.low)), high = spread(static_cast<int32_t>(g.high));
  for (int64_t c = 0; c < g.channels; c += LANES) {
    vreal x_hat = floor(multiply_add(to_real(sub(multiply(load(u + c), channels), total)), weight, half));
    vreal z = multiply_add(x_hat, load(g.gain + c), load(g.offset + c));
    vint codes = clamp(add(floor_to_int(clamp(z, -1073741824.0, 1073741823.0)), load(g.zero + c)), low, high);
    if (g.channels - c >= LANES)
      store_bytes(y + c, codes);
    else
      store_bytes(y + c, codes, static_cast<int>(g.channels - c));
  }
}

template <bool WIDE>
static void run_norm(const Norm& g, Job& job) {
  const uint8_t* x = job.memory.at(g.x);
  uint8_t* y = job.memory.at(g.y);
  const int64_t piece = g.channels / g.pieces;
  int32_t* u = reinterpret_cast<int32_t*>(job.scratch.bytes((g.channels + 64) * 4));
  job.share(g.rows * job.memory.batch, 4, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const int64_t image = r / g.rows, row = r - image * g.rows;
      const int32_t* sources = g.map == nullptr ? nullptr : g.map + row * g.pieces;
      if (sources != nullptr && sources[0] < 0) {
        std::memset(y + r * g.channels, static_cast<int>(g.fill), g.channels);
        continue;
      }
      Moments m{0, 0};
      for (int64_t p = 0; p < g.pieces; ++p) {
        int64_t source = image * g.in_rows + (sources == nullptr ? row : sources[p]);
        add_moments<WIDE>(g, x + source * piece, p * piece, (p + 1) * piece, u, m);
      }
      normalize(g, m, u, y + r * g.channels);
    }
  });
}

static void run(const Norm& g, Job& job) { g.wide ? run_norm<true>(g, job) : run_norm<false>(g, job); }

}  // namespace fq
