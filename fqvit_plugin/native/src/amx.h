// Products by AMX, whose tiles hold 16 rows of 64 bytes: the packed weights of gemm.h are such tiles as they lie. Attention
// goes without: of its short products the packing and the grids between them take the time.
#pragma once

#include "simd.h"

#if FQ_AVX512 && defined(__AVX512VNNI__) && defined(__AMX_INT8__) && defined(__linux__)
#define FQ_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>
#endif

namespace fq {

constexpr int AMX_ROWS = 32;   // at once: two tiles
constexpr int AMX_FOURS = 16;  // of the depth, in a tile

#if FQ_AMX

// Tiles 0 to 3 hold sums, 2 and 3 those of the rows from 16 on, 4 and 5 bytes, 6 and 7 weights.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
  explicit TileShapes(int count) {
    const uint8_t first = static_cast<uint8_t>(count < 16 ? count : 16);
    const uint8_t second = static_cast<uint8_t>(count > 16 ? count - 16 : 1);
    for (int tile : {0, 1, 4}) rows[tile] = first;
    for (int tile : {2, 3, 5}) rows[tile] = second;
    for (int tile : {6, 7}) rows[tile] = AMX_FOURS;
  }
};

// Linux lends tiles to a process that asks for them, and may refuse.
static inline bool ask_for_tiles() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
static const bool HAS_AMX = ask_for_tiles();

// Compilers do not see all that tile instructions read: what lies there stands in memory from here on.
FQ_INLINE void written(const void* place) { asm volatile("" ::"r"(place) : "memory"); }

static thread_local int shaped_rows = 0;  // what this thread's tiles are shaped for; 0: nothing

FQ_INLINE void shape_tiles(int rows) {
  if (shaped_rows == rows) return;
  const TileShapes shapes(rows);
  written(&shapes);
  _tile_loadconfig(&shapes);
  shaped_rows = rows;
}

// Of one thread, when its work is done: tiles in use make every switch between threads dearer.
static inline void release_tiles() {
  if (shaped_rows != 0) _tile_release();
  shaped_rows = 0;
}

// As `tile` of gemm.h, for one or two tiles of rows by one or two vectors of columns. `last`: [rows][64], the end of each
// row, 0 where another tile has it already.
template <int TALL, int WIDE>
static void amx_block(const uint8_t* a, int64_t stride, const uint8_t* last, const int8_t* w, int64_t w_stride,
                      int64_t depth, const int32_t* start, int32_t* out, int64_t out_stride) {
  _tile_loadd(0, start, 0);
  if constexpr (WIDE == 2) _tile_loadd(1, start + LANES, 0);
  if constexpr (TALL == 2) _tile_loadd(2, start, 0);
  if constexpr (TALL == 2 && WIDE == 2) _tile_loadd(3, start + LANES, 0);
  auto add = [&](const uint8_t* rows, int64_t step, const int8_t* weights) FQ_ALWAYS {
    _tile_loadd(4, rows, step);
    _tile_loadd(6, weights, w_stride);
    _tile_dpbusd(0, 4, 6);
    if constexpr (WIDE == 2) _tile_loadd(7, weights + 4 * LANES, w_stride);
    if constexpr (WIDE == 2) _tile_dpbusd(1, 4, 7);
    if constexpr (TALL == 2) _tile_loadd(5, rows + 16 * step, step);
    if constexpr (TALL == 2) _tile_dpbusd(2, 5, 6);
    if constexpr (TALL == 2 && WIDE == 2) _tile_dpbusd(3, 5, 7);
  };
  for (int64_t d = 0; d + AMX_FOURS <= depth; d += AMX_FOURS) add(a + 4 * d, stride, w + d * w_stride);
  if (depth % AMX_FOURS != 0) add(last, 64, w + (depth - AMX_FOURS) * w_stride);
  const int64_t step = out_stride * sizeof(int32_t);
  _tile_stored(0, out, step);
  if constexpr (WIDE == 2) _tile_stored(1, out + LANES, step);
  if constexpr (TALL == 2) _tile_stored(2, out + 16 * out_stride, step);
  if constexpr (TALL == 2 && WIDE == 2) _tile_stored(3, out + 16 * out_stride + LANES, step);
}

// As `tile` of gemm.h, for up to AMX_ROWS rows.
static inline void amx_tile(int rows, int vectors, const uint8_t* a, int64_t stride, const int8_t* w, int64_t depth,
                            const int32_t* start, int32_t* out, int64_t out_stride) {
  alignas(64) uint8_t last[AMX_ROWS * 64];
  const int64_t rest = depth % AMX_FOURS * 4;
  for (int r = 0; rest != 0 && r < rows; ++r) {
    std::memset(last + r * 64, 0, 64 - rest);
    std::memcpy(last + (r + 1) * 64 - rest, a + r * stride + depth * 4 - rest, rest);
  }
  written(last);
  shape_tiles(rows);
  const auto pair = rows > 16 ? amx_block<2, 2> : amx_block<1, 2>, single = rows > 16 ? amx_block<2, 1> : amx_block<1, 1>;
  const int64_t w_stride = vectors * LANES * 4;
  for (int v = 0; v < vectors; v += 2)
    (v + 1 < vectors ? pair : single)(a, stride, last, w + v * LANES * 4, w_stride, depth, start + v * LANES,
                                      out + v * LANES, out_stride);
}

#else

constexpr bool HAS_AMX = false;
static inline void release_tiles() {}
static inline void amx_tile(int, int, const uint8_t*, int64_t, const int8_t*, int64_t, const int32_t*, int32_t*, int64_t) {}

#endif

}  // namespace fq
