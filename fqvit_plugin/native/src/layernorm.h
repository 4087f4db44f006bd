// Integer LayerNorm of rows of bytes. Every number stays below 2**53, so that doubles hold it exactly; rows for which
// that cannot be said are computed in 64-bit integers.
#pragma once

#include "common.h"

namespace fq {

struct Moments {
  int64_t sum, squares;
};

// u = byte * factor - center, of one row
static inline Moments moments(const Norm& g, const uint8_t* x, int32_t* u) {
  vint total = spread(int32_t{0}), squares = total;
  int64_t sum_of_squares = 0;
  int64_t c = 0;
  for (int block = 0; c + LANES <= g.channels; c += LANES) {
    vint value = sub(multiply(load_bytes(x + c), load(g.factor + c)), load(g.center + c));
    store(u + c, value);
    total = add(total, value);
    squares = add(squares, multiply(value, value));
    if (++block == 64) {  // squares are below 2**24, so 64 of them fit
      sum_of_squares += sum(squares);
      squares = spread(int32_t{0});
      block = 0;
    }
  }
  Moments m{sum(total), sum_of_squares + sum(squares)};
  for (; c < g.channels; ++c) {
    u[c] = x[c] * g.factor[c] - g.center[c];
    m.sum += u[c];
    m.squares += static_cast<int64_t>(u[c]) * u[c];
  }
  return m;
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

static inline void normalize(const Norm& g, const uint8_t* x, uint8_t* y, int32_t* u) {
  Moments m = moments(g, x, u);
  int64_t spread_of_row = g.channels * m.squares - m.sum * m.sum;
  int64_t variance = spread_of_row + g.guard;
  int64_t radicand = g.root_bits >= 0 ? variance << (2 * g.root_bits) : variance >> (-2 * g.root_bits);
  if (radicand > (int64_t{1} << 52)) radicand = int64_t{1} << 52;
  int64_t root = floor_sqrt(radicand);
  int64_t reciprocal = (int64_t{1} << (45 + g.root_bits)) / (root > 0 ? root : 1);
  // |C u - S| <= sqrt(C) times the root of C sum u^2 - S^2
  double largest = std::sqrt(static_cast<double>(g.channels) * static_cast<double>(spread_of_row));
  if (reciprocal >= (int64_t{1} << 53) || largest * static_cast<double>(reciprocal) > 4.0e15) {
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

static void run(const Norm& g, Job& job) {
  const uint8_t* x = job.memory.at(g.x);
  uint8_t* y = job.memory.at(g.y);
  int32_t* u = reinterpret_cast<int32_t*>(job.scratch.bytes((g.channels + 64) * 4));
  job.share(g.rows * job.memory.batch, 4, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      int64_t image = r / g.rows, source = g.map == nullptr ? r % g.rows : g.map[r % g.rows];
      if (source < 0)
        std::memset(y + r * g.channels, static_cast<int>(g.fill), g.channels);
      else
        normalize(g, x + (image * g.in_rows + source) * g.channels, y + r * g.channels, u);
    }
  });
}

}  // namespace fq
