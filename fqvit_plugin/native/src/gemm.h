// Products of bytes by signed bytes with packed weights, exact in 32 bits.
//
// Weights are packed into panels of a few vectors of columns: [panel][depth / 4][columns][4]. A tile of rows by one panel
// stays in registers over the whole depth.
#pragma once

#include "amx.h"
#include "common.h"

namespace fq {

constexpr int MAX_COLUMNS = MAX_VECTORS * LANES;
constexpr int MAX_ROWS = AMX_ROWS;  // of a tile of any kind
#if FQ_AVX512
constexpr int rows_of(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#else
constexpr int rows_of(int vectors) { return vectors == 2 ? 4 : 6; }
#endif

// How columns fall into panels: as even as can be, none wider than MAX_VECTORS.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t columns)
      : vectors((columns + LANES - 1) / LANES), count((vectors + MAX_VECTORS - 1) / MAX_VECTORS) {}
  int64_t start(int64_t panel) const { return panel * vectors / count * LANES; }  // a column
  int width(int64_t panel) const { return static_cast<int>((start(panel + 1) - start(panel)) / LANES); }
  int64_t columns() const { return vectors * LANES; }
};

FQ_INLINE int64_t fours(int64_t depth) { return (depth + 3) / 4; }

// f(0), f(1), ..., f(N - 1) written out, with constants: compilers then keep arrays of vectors in registers.
template <int... I, typename F>
FQ_INLINE void repeat(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
FQ_INLINE void repeat(F f) {
  repeat(std::make_integer_sequence<int, N>{}, f);
}

// out[ROWS][...] = start + a w. The last four of a row may lie behind it, where weights are 0.
template <int ROWS, int VECTORS>
static void tile(const uint8_t* a, int64_t stride, const int8_t* w, int64_t depth, const int32_t* start, int32_t* out,
                 int64_t out_stride) {
  vint sums[ROWS][VECTORS];
  repeat<ROWS>([&](auto r) FQ_ALWAYS {
    repeat<VECTORS>([&](auto v) FQ_ALWAYS { sums[r][v] = load(start + v * LANES); });
  });
  for (int64_t d = 0; d < depth; ++d) {
    vweights weights[VECTORS];
    repeat<VECTORS>([&](auto v) FQ_ALWAYS { weights[v] = load_weights(w + (d * VECTORS + v) * 4 * LANES); });
    repeat<ROWS>([&](auto r) FQ_ALWAYS {
      vbytes bytes = spread_bytes(a + r * stride + 4 * d);
      repeat<VECTORS>([&](auto v) FQ_ALWAYS { sums[r][v] = dot(sums[r][v], bytes, weights[v]); });
    });
  }
  repeat<ROWS>([&](auto r) FQ_ALWAYS {
    repeat<VECTORS>([&](auto v) FQ_ALWAYS { store(out + r * out_stride + v * LANES, sums[r][v]); });
  });
}

using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, const int32_t*, int32_t*, int64_t);

template <int VECTORS, int ROWS>
static Tile tile_of_rows(int rows) {
  if constexpr (ROWS == 0) {
    return nullptr;
  } else {
    return rows == ROWS ? tile<ROWS, VECTORS> : tile_of_rows<VECTORS, ROWS - 1>(rows);
  }
}

static inline Tile tile_of(int rows, int vectors) {
  switch (vectors) {
    case 1: return tile_of_rows<1, rows_of(1)>(rows);
    case 2: return tile_of_rows<2, rows_of(2)>(rows);
#if FQ_AVX512
    case 3: return tile_of_rows<3, rows_of(3)>(rows);
    case 4: return tile_of_rows<4, rows_of(4)>(rows);
#endif
    default: return nullptr;
  }
}

// The next rows of `rest`: as many as fit a tile, the last tiles of like height.
FQ_INLINE int tile_rows(int64_t rest, int most) {
  if (rest >= 2 * most) return most;
  return static_cast<int>(rest > most ? (rest + 1) / 2 : rest);
}

// All rows of a by all columns of w.
static inline void product(const uint8_t* a, int64_t stride, int64_t rows, const int8_t* w, const Panels& panels,
                           int64_t depth, const int32_t* start, int32_t* out, int64_t out_stride) {
  for (int64_t p = 0; p < panels.count; ++p) {
    int64_t column = panels.start(p);
    int vectors = panels.width(p);
    for (int64_t row = 0; row < rows;) {
      int n = tile_rows(rows - row, rows_of(vectors));
      tile_of(n, vectors)(a + row * stride, stride, w + column * depth * 4, depth, start + column,
                          out + row * out_stride + column, out_stride);
      row += n;
    }
  }
}

static inline void pack(const int8_t* weight, int64_t columns, int64_t depth, int8_t* out) {
  Panels panels(columns);
  for (int64_t p = 0; p < panels.count; ++p)
    for (int64_t d = 0; d < fours(depth); ++d)
      for (int64_t c = panels.start(p); c < panels.start(p + 1); ++c)
        for (int64_t i = 4 * d; i < 4 * d + 4; ++i) *out++ = c < columns && i < depth ? weight[c * depth + i] : 0;
}

// ---------------------------------------------------------------- new grids

FQ_INLINE vint requantize(vint sums, const Requant& to, int64_t column, vint low, vint high) {
  vreal y = multiply_add(to_real(sums), load(to.gain + column), load(to.offset + column));
  if (to.wide) y = clamp(y, -1073741824.0, 1073741823.0);
  return clamp(add(floor_to_int(y), load(to.zero + column)), low, high);
}

FQ_INLINE vint sum_codes(vint a, vint b, const Sum& to, int64_t column, vint low, vint high) {
  vreal y = multiply_add(to_real(b), load(to.gain_b + column), load(to.offset + column));
  y = multiply_add(to_real(a), load(to.gain_a + column), y);
  return clamp(floor_to_int(y), low, high);
}

// As PULL of functional.py.
constexpr int64_t PULL = 7;

// The byte of a whole number by the rule of escape.py, and the number of a byte.
static inline int64_t escaped(int64_t y, const Escapes& far, int64_t i, int64_t low, int64_t high) {
  const int64_t end = far.end[i], value = far.value[i];
  if (end >= 0) (end < value ? high : low) += end < value ? -1 : 1;
  const int64_t code = y < low ? low : (y > high ? high : y);
  const bool outside = end >= 0 && (end < value ? y > code : y < code);
  return outside && std::abs(y - value) <= PULL * std::abs(y - code) ? end : code;
}

static inline int64_t number_of(int64_t byte, const Escapes& far, int64_t i) {
  return byte == far.end[i] ? far.value[i] : byte;
}

static inline int64_t sum_of(int64_t a, int64_t b, const Sum& to, int64_t i) {
  const int64_t c = to.far.channel[i];
  const double from_b = static_cast<double>(number_of(b, to.far_b, i)) * to.gain_b[c] + to.offset[c];
  const double y = static_cast<double>(number_of(a, to.far_a, i)) * to.gain_a[c] + from_b;
  return escaped(static_cast<int64_t>(std::floor(y)), to.far, i, to.low, to.high);
}

// Sums of the channels column.. with an escape, once more.
template <bool ADD>
static void finish_escapes(const int32_t* sums, const Gemm& g, int64_t column, int64_t columns, uint8_t* y,
                           const uint8_t* residual) {
  const Escapes& far = ADD ? g.sum.far_a : g.requant.far;
  for (int64_t i = 0; i < far.count; ++i) {
    const int64_t c = far.channel[i];
    if (c < column || c >= column + columns) continue;
    const double whole = std::floor(sums[c - column] * g.requant.gain[c] + g.requant.offset[c]);
    const int64_t code = escaped(static_cast<int64_t>(whole) + g.requant.zero[c], far, i, g.requant.low, g.requant.high);
    y[c] = static_cast<uint8_t>(ADD ? sum_of(code, residual[c], g.sum, i) : code);
  }
}

// TABLE: a look-up follows, ADD: a residual sum does; never both.
template <bool TABLE, bool ADD>
static void finish(const int32_t* sums, const Gemm& g, int64_t column, int vectors, uint8_t* y, const uint8_t* residual) {
  vint low = spread(static_cast<int32_t>(g.requant.low)), high = spread(static_cast<int32_t>(g.requant.high));
  vint sum_low = spread(static_cast<int32_t>(g.sum.low)), sum_high = spread(static_cast<int32_t>(g.sum.high));
  const int64_t first = column;
  for (int v = 0; v < vectors; ++v, column += LANES) {
    int64_t rest = g.columns - column;
    vint codes = requantize(load(sums + v * LANES), g.requant, column, low, high);
    if (TABLE) codes = look_up(codes, g.requant.table);
    if (rest >= LANES) {
      if (ADD) codes = sum_codes(codes, load_bytes(residual + column), g.sum, column, sum_low, sum_high);
      store_bytes(y + column, codes);
    } else {
      int n = static_cast<int>(rest);
      if (ADD) codes = sum_codes(codes, load_bytes(residual + column, n), g.sum, column, sum_low, sum_high);
      store_bytes(y + column, codes, n);
    }
  }
  if (!TABLE) finish_escapes<ADD>(sums, g, first, column - first, y, residual);
}

// ---------------------------------------------------------------- the step

template <bool TABLE, bool ADD>
static void gemm_part(const Gemm& g, const Memory& memory, int64_t from, int64_t to, const Panels& panels, int64_t p) {
  alignas(64) int32_t sums[MAX_ROWS * MAX_COLUMNS];
  const uint8_t* x = memory.at(g.x);
  uint8_t* y = memory.at(g.y);
  const uint8_t* residual = ADD ? memory.at(g.residual) : nullptr;
  int64_t column = panels.start(p), depth = fours(g.depth);
  int vectors = panels.width(p);
  const bool in_amx = HAS_AMX && depth >= AMX_FOURS;
  const int most = in_amx ? AMX_ROWS : rows_of(vectors);
  const int8_t* weight = g.weight + column * depth * 4;
  for (int64_t row = from; row < to;) {
    int rows = tile_rows(to - row, most);
    const uint8_t* a = x + row * g.depth;
    if (in_amx)
      amx_tile(rows, vectors, a, g.depth, weight, depth, g.start + column, sums, MAX_COLUMNS);
    else
      tile_of(rows, vectors)(a, g.depth, weight, depth, g.start + column, sums, MAX_COLUMNS);
    for (int r = 0; r < rows; ++r, ++row) {
      int64_t target = row;
      if (g.map != nullptr) {
        int64_t image = row / g.rows, mapped = g.map[row % g.rows];
        if (mapped < 0) continue;
        target = image * g.out_rows + mapped;
      }
      finish<TABLE, ADD>(sums + r * MAX_COLUMNS, g, column, vectors, y + target * g.columns,
                         ADD ? residual + target * g.columns : nullptr);
    }
  }
}

static void run(const Gemm& g, Job& job) {
  Panels panels(g.columns);
  int64_t rows = g.rows * job.memory.batch;
  // rows of a part: few enough that every thread has several parts, and that x stays in the cache
  int64_t blocks = (rows + 95) / 96, block = (rows + blocks - 1) / blocks;
  block = (block + 5) / 6 * 6;
  blocks = (rows + block - 1) / block;
  job.parts(blocks * panels.count, [&](int64_t part) {
    int64_t from = part / panels.count * block, to = from + block < rows ? from + block : rows, p = part % panels.count;
    if (g.requant.table != nullptr)
      gemm_part<true, false>(g, job.memory, from, to, panels, p);
    else if (g.residual >= 0)
      gemm_part<false, true>(g, job.memory, from, to, panels, p);
    else
      gemm_part<false, false>(g, job.memory, from, to, panels, p);
  });
}

}  // namespace fq
