// Log-Int-Softmax attention, one head of one image or window at a time: no logit leaves the cache.
#pragma once

#include "gemm.h"

namespace fq {

constexpr int QUERIES = 12;  // rows that are worked on together

// Sizes of a head, and where its parts stand in a thread's memory.
struct Head {
  const Attention& g;
  Panels key_panels, value_panels;
  int64_t depth, key_fours, width;  // width: bytes of a row of logits or powers
  int8_t *keys, *values;
  int32_t *start, *zeros, *sums;
  uint8_t *logits, *powers;

  Head(const Attention& attention, Scratch& scratch)
      : g(attention),
        key_panels(g.keys + 1),  // and a column of ones, which sums the queries' bytes
        value_panels(g.value_depth),
        depth(fours(g.depth)),
        key_fours(fours(g.keys)),
        width((key_panels.columns() + 63) / 64 * 64) {
    int64_t columns = width > value_panels.columns() ? width : value_panels.columns() + 64;
    size_t used = 0;
    auto take = [&](int64_t bytes) {
      size_t at = used;
      used += (static_cast<size_t>(bytes) + 127) / 64 * 64;
      return at;
    };
    size_t k = take(key_panels.columns() * depth * 4), v = take(value_panels.columns() * key_fours * 4);
    size_t st = take(columns * 4), z = take(columns * 4), su = take(2 * QUERIES * columns * 4);
    size_t l = take(QUERIES * width), p = take(2 * QUERIES * width);
    uint8_t* memory = scratch.bytes(used);
    keys = reinterpret_cast<int8_t*>(memory + k), values = reinterpret_cast<int8_t*>(memory + v);
    start = reinterpret_cast<int32_t*>(memory + st), zeros = reinterpret_cast<int32_t*>(memory + z);
    sums = reinterpret_cast<int32_t*>(memory + su), logits = memory + l, powers = memory + p;
    std::memset(zeros, 0, columns * 4);
    sum_stride = columns;
    for (int d = 0; d < 256; ++d) power[d] = g.exponents[d] < 0 ? 0 : static_cast<uint16_t>(1u << g.exponents[d]);
  }
  int64_t sum_stride;
  uint16_t power[256];  // of a distance from the row's maximum
};

FQ_INLINE uint32_t signed_four(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  return four ^ 0x80808080u;
}

#if defined(__SSE2__)
FQ_INLINE __m128i signed_sixteen(const uint8_t* p) {
  return _mm_xor_si128(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8(-128));
}
FQ_INLINE void store_sixteen(int8_t* p, __m128i x) { _mm_storeu_si128((__m128i*)p, x); }

// Four rows of sixteen bytes, in fours: out[four][row][4], `step` bytes from four to four.
FQ_INLINE void transpose_fours(const uint8_t* p, int64_t row, int8_t* out, int64_t step) {
  __m128i a = signed_sixteen(p), b = signed_sixteen(p + row), c = signed_sixteen(p + 2 * row), d = signed_sixteen(p + 3 * row);
  __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
  store_sixteen(out, _mm_unpacklo_epi64(ab, cd));
  store_sixteen(out + step, _mm_unpackhi_epi64(ab, cd));
  ab = _mm_unpackhi_epi32(a, b), cd = _mm_unpackhi_epi32(c, d);
  store_sixteen(out + 2 * step, _mm_unpacklo_epi64(ab, cd));
  store_sixteen(out + 3 * step, _mm_unpackhi_epi64(ab, cd));
}

// Four rows of sixteen bytes: out[byte][row].
FQ_INLINE void interleave(const uint8_t* p, int64_t row, int8_t* out) {
  __m128i a = signed_sixteen(p), b = signed_sixteen(p + row), c = signed_sixteen(p + 2 * row), d = signed_sixteen(p + 3 * row);
  __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
  store_sixteen(out, _mm_unpacklo_epi16(ab, cd));
  store_sixteen(out + 16, _mm_unpackhi_epi16(ab, cd));
  ab = _mm_unpackhi_epi8(a, b), cd = _mm_unpackhi_epi8(c, d);
  store_sixteen(out + 32, _mm_unpacklo_epi16(ab, cd));
  store_sixteen(out + 48, _mm_unpackhi_epi16(ab, cd));
}
#endif

// Keys as packed weights of queries x keys, and what takes the zero points off the columns.
static inline void pack_keys(const Head& h, const uint8_t* k) {
  const Attention& g = h.g;
  const uint8_t ones[4] = {1, 1, 1, 1};
  uint32_t last = g.depth % 4 == 0 ? ~0u : (1u << (8 * (g.depth % 4))) - 1;
  for (int64_t p = 0; p < h.key_panels.count; ++p) {
    int64_t column = h.key_panels.start(p), columns = h.key_panels.width(p) * LANES;
    int8_t* out = h.keys + column * h.depth * 4;
    int64_t c = 0;
#if defined(__SSE2__)
    for (; g.depth % 16 == 0 && c + 4 <= columns && column + c + 4 <= g.keys; c += 4)
      for (int64_t d = 0; d < h.depth; d += 4)
        transpose_fours(k + (column + c) * g.k_row + 4 * d, g.k_row, out + (d * columns + c) * 4, 4 * columns);
#endif
    for (; c < columns; ++c) {
      const uint8_t* row = k + (column + c) * g.k_row;
      for (int64_t d = 0; d < h.depth; ++d) {
        uint32_t four = column + c < g.keys ? signed_four(row + 4 * d) : (column + c == g.keys ? 0x01010101u : 0);
        if (d == h.depth - 1) four &= last;
        std::memcpy(out + (d * columns + c) * 4, &four, 4);
      }
    }
    vint zero = spread(static_cast<int32_t>(-(g.zero_q + 128)));
    vint all = spread(static_cast<int32_t>((g.zero_q + 128) * g.zero_k * g.depth));
    for (c = 0; c < columns; c += LANES) {
      vint total = spread(int32_t{0});
      for (int64_t d = 0; d < h.depth; ++d)
        total = dot(total, spread_bytes(ones), load_weights(out + (d * columns + c) * 4));
      store(h.start + column + c, add(all, multiply(zero, total)));
    }
  }
  h.start[g.keys] = 0;
}

// Values as packed weights of powers x values.
static inline void pack_values(const Head& h, const uint8_t* v) {
  const Attention& g = h.g;
  for (int64_t p = 0; p < h.value_panels.count; ++p) {
    int64_t column = h.value_panels.start(p), columns = h.value_panels.width(p) * LANES;
    int64_t inside = g.value_depth - column < columns ? g.value_depth - column : columns;
    for (int64_t t = 0; t < g.keys; t += 4) {
      int8_t* out = h.values + column * h.key_fours * 4 + t * columns;
      const uint8_t* rows = v + t * g.v_row + column;
      int64_t c = 0;
#if defined(__SSE2__)
      for (; t + 4 <= g.keys && c + 16 <= inside; c += 16) interleave(rows + c, g.v_row, out + 4 * c);
#endif
      for (; c < columns; ++c)
        for (int64_t i = 0; i < 4; ++i)
          out[4 * c + i] = t + i < g.keys && c < inside ? static_cast<int8_t>(rows[i * g.v_row + c] ^ 0x80) : 0;
    }
  }
}

// Bytes of logits of some queries.
static inline void logits_of(const Head& h, const uint8_t* q, int rows, const uint8_t* bias) {
  const Attention& g = h.g;
  product(q, g.q_row, rows, h.keys, h.key_panels, h.depth, h.start, h.sums, h.sum_stride);
  vreal gain = spread(*g.logits.gain), offset = spread(*g.logits.offset);
  vreal gain_a = spread(1.0), gain_b = gain_a, sum_offset = gain_a;
  if (bias != nullptr) gain_a = spread(*g.sum.gain_a), gain_b = spread(*g.sum.gain_b), sum_offset = spread(*g.sum.offset);
  vint low = spread(static_cast<int32_t>(g.logits.low)), high = spread(static_cast<int32_t>(g.logits.high));
  vint sum_low = spread(static_cast<int32_t>(g.sum.low)), sum_high = spread(static_cast<int32_t>(g.sum.high));
  vint zero = spread(*g.logits.zero);
  for (int r = 0; r < rows; ++r) {
    const int32_t* sums = h.sums + r * h.sum_stride;
    vint row = spread(static_cast<int32_t>(-g.zero_k) * sums[g.keys]);
    for (int64_t t = 0; t < g.keys; t += LANES) {
      vreal y = multiply_add(to_real(add(load(sums + t), row)), gain, offset);
      if (g.logits.wide) y = clamp(y, -1073741824.0, 1073741823.0);
      vint codes = clamp(add(floor_to_int(y), zero), low, high);
      if (bias != nullptr) {
        const uint8_t* b = bias + r * g.keys + t;
        vint other = g.keys - t >= LANES ? load_bytes(b) : load_bytes(b, static_cast<int>(g.keys - t));
        y = multiply_add(to_real(codes), gain_a, multiply_add(to_real(other), gain_b, sum_offset));
        codes = clamp(floor_to_int(y), sum_low, sum_high);
      }
      store_bytes(h.logits + r * h.width + t, codes);
    }
  }
}

// A row's powers of two, the low and the high eight apart; gives their sum.
#if FQ_AVX512 && defined(__AVX512VBMI__)
static inline int64_t powers_of(const Head& h, const uint8_t* x, const uint8_t* mask, uint8_t* low, uint8_t* high) {
  const int64_t keys = h.g.keys;
  auto inside = [&](int64_t t) {
    __mmask64 valid = keys - t >= 64 ? ~0ull : (1ull << (keys - t)) - 1;
    return mask == nullptr ? valid : _mm512_mask_testn_epi8_mask(valid, _mm512_maskz_loadu_epi8(valid, mask + t),
                                                                 _mm512_set1_epi8(-1));
  };
  __m512i top = _mm512_setzero_si512();
  for (int64_t t = 0; t < keys; t += 64) top = _mm512_max_epu8(top, _mm512_maskz_loadu_epi8(inside(t), x + t));
  __m256i half = _mm256_max_epu8(_mm512_castsi512_si256(top), _mm512_extracti64x4_epi64(top, 1));
  __m128i quarter = _mm_max_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  quarter = _mm_max_epu8(quarter, _mm_srli_epi16(quarter, 8));  // then the smallest of inverted 16-bit words
  quarter = _mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(255), _mm_and_si128(quarter, _mm_set1_epi16(255))));
  const __m512i largest = _mm512_set1_epi8(static_cast<char>(255 - _mm_extract_epi16(quarter, 0)));
  const int8_t* e = h.g.exponents;
  const __m512i e0 = _mm512_loadu_si512(e), e1 = _mm512_loadu_si512(e + 64);
  const __m512i e2 = _mm512_loadu_si512(e + 128), e3 = _mm512_loadu_si512(e + 192);
  // a byte shuffle gives 0 where the index is negative
  const __m512i low_powers = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m512i high_powers = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, -128));
  __m512i low_sum = _mm512_setzero_si512(), high_sum = low_sum;
  for (int64_t t = 0; t < keys; t += 64) {
    __m512i distance = _mm512_sub_epi8(largest, _mm512_loadu_si512(x + t));
    __m512i near = _mm512_permutex2var_epi8(e0, distance, e1), far = _mm512_permutex2var_epi8(e2, distance, e3);
    __m512i exponent = _mm512_mask_blend_epi8(_mm512_movepi8_mask(distance), near, far);
    __mmask64 valid = inside(t);
    __m512i l = _mm512_maskz_shuffle_epi8(valid, low_powers, exponent);
    __m512i u = _mm512_maskz_shuffle_epi8(valid, high_powers, exponent);
    _mm512_storeu_si512(low + t, l);
    _mm512_storeu_si512(high + t, u);
    low_sum = _mm512_add_epi64(low_sum, _mm512_sad_epu8(l, _mm512_setzero_si512()));
    high_sum = _mm512_add_epi64(high_sum, _mm512_sad_epu8(u, _mm512_setzero_si512()));
  }
  return _mm512_reduce_add_epi64(_mm512_add_epi64(low_sum, _mm512_slli_epi64(high_sum, 8)));
}
#else
static inline int64_t powers_of(const Head& h, const uint8_t* x, const uint8_t* mask, uint8_t* low, uint8_t* high) {
  const int64_t keys = h.g.keys;
  uint8_t largest = 0;
  if (mask == nullptr) {
    for (int64_t t = 0; t < keys; ++t) largest = x[t] > largest ? x[t] : largest;
  } else {
    for (int64_t t = 0; t < keys; ++t) {
      uint8_t allowed = static_cast<uint8_t>(x[t] & ~mask[t]);
      largest = allowed > largest ? allowed : largest;
    }
  }
  int64_t low_sum = 0, high_sum = 0;
  for (int64_t t = 0; t < keys; ++t) {
    uint32_t power = h.power[static_cast<uint8_t>(largest - x[t])];
    if (mask != nullptr && mask[t]) power = 0;
    low_sum += low[t] = static_cast<uint8_t>(power);
    high_sum += high[t] = static_cast<uint8_t>(power >> 8);
  }
  for (int64_t t = keys; t < 4 * h.key_fours; ++t) low[t] = high[t] = 0;
  return low_sum + (high_sum << 8);
}
#endif

// Some queries, from logits to the codes of the result.
static inline void attend(const Head& h, int rows, const uint8_t* mask, uint8_t* y) {
  const Attention& g = h.g;
  int64_t totals[QUERIES];
  for (int r = 0; r < rows; ++r)
    totals[r] = powers_of(h, h.logits + r * h.width, mask == nullptr ? nullptr : mask + r * g.keys,
                          h.powers + r * h.width, h.powers + (rows + r) * h.width);
  product(h.powers, h.width, 2 * rows, h.values, h.value_panels, h.key_fours, h.zeros, h.sums, h.sum_stride);
  vint low = spread(static_cast<int32_t>(g.low)), high = spread(static_cast<int32_t>(g.high));
  vint zero = spread(static_cast<int32_t>(g.out_zero));
  vreal half = spread(0.5), gain = spread(g.gain), bytes = spread(256.0);
  for (int r = 0; r < rows; ++r) {
    // mean = (sum(p v) - zero sum(p)) r / 2**28 with r = floor(2**44 / sum(p))
    double reciprocal = static_cast<double>((int64_t{1} << 44) / totals[r]) / (1 << 28);
    vreal weight = spread(reciprocal), off = spread(static_cast<double>(-g.zero_v * totals[r]));
    const int32_t *low_sums = h.sums + r * h.sum_stride, *high_sums = h.sums + (rows + r) * h.sum_stride;
    for (int64_t d = 0; d < g.value_depth; d += LANES) {
      vreal sums = multiply_add(to_real(load(high_sums + d)), bytes, to_real(load(low_sums + d)));
      vreal mean = floor(multiply_add(multiply_add(spread(1.0), sums, off), weight, half));
      vint codes = clamp(add(floor_to_int(multiply_add(mean, gain, half)), zero), low, high);
      if (g.value_depth - d >= LANES)
        store_bytes(y + r * g.y_row + d, codes);
      else
        store_bytes(y + r * g.y_row + d, codes, static_cast<int>(g.value_depth - d));
    }
  }
}

static void run(const Attention& g, Job& job) {
  Head h(g, job.scratch);
  int64_t heads = g.groups * job.memory.batch * g.heads;
  int64_t most = (g.queries + QUERIES - 1) / QUERIES;  // a head is cut where there are few
  int64_t cuts = heads >= 4 * job.threads || job.threads == 1 ? 1 : (most < 4 ? most : 4);
  int64_t length = ((g.queries + cuts - 1) / cuts + QUERIES - 1) / QUERIES * QUERIES;
  cuts = (g.queries + length - 1) / length;
  job.parts(heads * cuts, [&](int64_t part) {
    int64_t group = part / (g.heads * cuts), head = part / cuts % g.heads, from = part % cuts * length;
    int64_t to = from + length < g.queries ? from + length : g.queries;
    const uint8_t* q = job.memory.at(g.q) + g.q_first + group * g.q_size + head * g.q_head;
    uint8_t* y = job.memory.at(g.y) + group * g.y_size + head * g.y_head;
    pack_keys(h, job.memory.at(g.k) + g.k_first + group * g.k_size + head * g.k_head);
    pack_values(h, job.memory.at(g.v) + g.v_first + group * g.v_size + head * g.v_head);
    const uint8_t* bias = g.bias == nullptr ? nullptr : g.bias + head * g.queries * g.keys;
    const uint8_t* mask = g.mask == nullptr ? nullptr : g.mask + group % g.masks * g.queries * g.keys;
    for (int64_t n = from; n < to; n += QUERIES) {
      int rows = static_cast<int>(to - n < QUERIES ? to - n : QUERIES);
      logits_of(h, q + n * g.q_row, rows, bias == nullptr ? nullptr : bias + n * g.keys);
      attend(h, rows, mask == nullptr ? nullptr : mask + n * g.keys, y + n * g.y_row);
    }
  });
}

}  // namespace fq
