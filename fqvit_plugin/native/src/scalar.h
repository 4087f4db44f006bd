// The operations of simd.h in plain C++, for every other machine.
#pragma once

#define FQ_ISA "generic"

namespace fq {

constexpr int LANES = 4;
constexpr int MAX_VECTORS = 2;
struct vint {
  int32_t at[LANES];
};
struct vreal {
  double at[LANES];
};

#define FQ_LANES for (int i = 0; i < LANES; ++i)

FQ_INLINE vint load(const int32_t* p) {
  vint y;
  std::memcpy(&y, p, sizeof y);
  return y;
}
FQ_INLINE void store(int32_t* p, vint x) { std::memcpy(p, &x, sizeof x); }
FQ_INLINE vint spread(int32_t x) { return {{x, x, x, x}}; }
FQ_INLINE vint add(vint a, vint b) {
  FQ_LANES a.at[i] += b.at[i];
  return a;
}
FQ_INLINE vint sub(vint a, vint b) {
  FQ_LANES a.at[i] -= b.at[i];
  return a;
}
FQ_INLINE vint multiply(vint a, vint b) {
  FQ_LANES a.at[i] *= b.at[i];
  return a;
}
FQ_INLINE vint clamp(vint x, vint low, vint high) {
  FQ_LANES x.at[i] = x.at[i] < low.at[i] ? low.at[i] : (x.at[i] > high.at[i] ? high.at[i] : x.at[i]);
  return x;
}
FQ_INLINE vint load_bytes(const uint8_t* p, int n) {
  vint y = spread(0);
  for (int i = 0; i < n; ++i) y.at[i] = p[i];
  return y;
}
FQ_INLINE vint load_bytes(const uint8_t* p) { return load_bytes(p, LANES); }
FQ_INLINE void store_bytes(uint8_t* p, vint x, int n) {
  for (int i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(x.at[i]);
}
FQ_INLINE void store_bytes(uint8_t* p, vint x) { store_bytes(p, x, LANES); }
FQ_INLINE vint look_up(vint x, const uint8_t* table) {
  FQ_LANES x.at[i] = table[x.at[i]];
  return x;
}
FQ_INLINE int64_t sum(vint x) {
  int64_t total = 0;
  FQ_LANES total += x.at[i];
  return total;
}

FQ_INLINE vreal load(const double* p) {
  vreal y;
  std::memcpy(&y, p, sizeof y);
  return y;
}
FQ_INLINE vreal spread(double x) { return {{x, x, x, x}}; }
FQ_INLINE double sum(vreal x) {
  double total = 0;
  FQ_LANES total += x.at[i];
  return total;
}
FQ_INLINE vreal to_real(vint x) {
  vreal y;
  FQ_LANES y.at[i] = x.at[i];
  return y;
}
FQ_INLINE vreal multiply_add(vreal a, vreal b, vreal c) {
  FQ_LANES a.at[i] = a.at[i] * b.at[i] + c.at[i];
  return a;
}
FQ_INLINE vreal clamp(vreal x, double low, double high) {
  FQ_LANES x.at[i] = x.at[i] < low ? low : (x.at[i] > high ? high : x.at[i]);
  return x;
}
FQ_INLINE vreal floor(vreal x) {
  FQ_LANES x.at[i] = std::floor(x.at[i]);
  return x;
}
FQ_INLINE vint floor_to_int(vreal x) {
  vint y;
  FQ_LANES {
    y.at[i] = static_cast<int32_t>(x.at[i]);
    y.at[i] -= y.at[i] > x.at[i];
  }
  return y;
}

using vbytes = vint;
struct vweights {
  int8_t at[4 * LANES];
};
FQ_INLINE vbytes spread_bytes(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
FQ_INLINE vweights load_weights(const int8_t* p) {
  vweights w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
FQ_INLINE vint dot(vint sums, const vbytes& a, const vweights& w) {
  FQ_LANES for (int j = 0; j < 4; ++j) sums.at[i] += a.at[j] * w.at[4 * i + j];
  return sums;
}

#undef FQ_LANES

}  // namespace fq
