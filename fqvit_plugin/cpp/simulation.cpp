// One pass over memory for what the simulation does between two matrix products, instead of one for each operation.
// The arithmetic is that of fused.py, in the same order: float64 where it must be exact, so both give the same bits.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

inline float clamped(double y, float low, float high) {
  float v = static_cast<float>(y);
  v = v < low ? low : v;
  return v > high ? high : v;
}

// Rows of C elements go to the threads in one piece each.
template <class Row>
void for_rows(int64_t rows, int64_t c, Row row) {
#pragma omp parallel for schedule(static) if (rows * c > 16384)
  for (int64_t i = 0; i < rows; ++i) row(i);
}

}  // namespace

extern "C" {

// y = clamp(floor(x gain + offset), low, high) scale; out may be x
void fq_rescale(const float* x, float* out, int64_t rows, int64_t c, const double* gain, const double* offset,
                const float* low, const float* high, const float* scale) {
  for_rows(rows, c, [=](int64_t i) {
    const float* a = x + i * c;
    float* y = out + i * c;
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) y[j] = clamped(std::floor(a[j] * gain[j] + offset[j]), low[j], high[j]) * scale[j];
  });
}

// y = table[clamp(floor(x gain + offset) - first, 0, count - 1)]
void fq_table(const float* x, float* out, int64_t rows, int64_t c, const double* gain, const double* offset,
              const float* table, int64_t first, int64_t count) {
  for_rows(rows, c, [=](int64_t i) {
    const float* a = x + i * c;
    float* y = out + i * c;
    const double last = static_cast<double>(count - 1), base = static_cast<double>(first);
    int32_t index[256];
    for (int64_t start = 0; start < c; start += 256) {
      const int64_t n = c - start < 256 ? c - start : 256;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        double k = std::floor(a[start + j] * gain[start + j] + offset[start + j]) - base;
        k = k < 0.0 ? 0.0 : k;
        index[j] = static_cast<int32_t>(k > last ? last : k);
      }
      for (int64_t j = 0; j < n; ++j) y[start + j] = table[index[j]];
    }
  });
}

// y = clamp(floor(round(a inverse_a) gain_a + (round(b inverse_b) gain_b + 1/2)), low, high) scale; b has b_rows rows
void fq_add(const float* a, const float* b, float* out, int64_t rows, int64_t b_rows, int64_t c,
            const float* inverse_a, const float* inverse_b, const double* gain_a, const double* gain_b,
            const float* low, const float* high, const float* scale) {
  for_rows(rows, c, [=](int64_t i) {
    const float *p = a + i * c, *q = b + (i % b_rows) * c;
    float* y = out + i * c;
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) {
      const double second = std::nearbyint(q[j] * inverse_b[j]) * gain_b[j] + 0.5;
      const double sum = std::nearbyint(p[j] * inverse_a[j]) * gain_a[j] + second;
      y[j] = clamped(std::floor(sum), low[j], high[j]) * scale[j];
    }
  });
}

// y = round(x inverse)
void fq_steps(const float* x, float* out, int64_t rows, int64_t c, float inverse) {
  for_rows(rows, c, [=](int64_t i) {
    const float* a = x + i * c;
    float* y = out + i * c;
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) y[j] = std::nearbyint(a[j] * inverse);
  });
}

// Log-Int-Softmax of rows of steps: powers 2^-k with k = round(distance octaves), 0 from k = zero on; those above
// 2^-7.5 go to high, which may be x, the others to low, their sum to total. With a mask the rows are those of
// (batch, windows, heads, n), the mask's those of (windows, n); negative where attention is forbidden.
void fq_powers(const float* x, float* high, float* low, float* total, int64_t rows, int64_t c, float octaves,
               float zero, const float* mask, int64_t windows, int64_t heads, int64_t n) {
  for_rows(rows, c, [=](int64_t i) {
    const float* a = x + i * c;
    float *h = high + i * c, *l = low + i * c;
    const float* m = mask ? mask + (i / (n * heads) % windows * n + i % n) * c : nullptr;
    float top = -INFINITY;
    if (m) {
      for (int64_t j = 0; j < c; ++j) top = (m[j] >= 0.0f && a[j] > top) ? a[j] : top;
    } else {
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < c; ++j) top = a[j] > top ? a[j] : top;
    }
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < c; ++j) {
      float k = std::nearbyint((top - a[j]) * octaves);
      k = k < 64.0f ? k : 64.0f;
      const int32_t bits = (127 - static_cast<int32_t>(k)) << 23;
      float power;
      std::memcpy(&power, &bits, sizeof power);
      power = k < zero ? power : 0.0f;
      if (m) power = m[j] < 0.0f ? 0.0f : power;
      const float first = k < 7.5f ? power : 0.0f;
      h[j] = first;
      l[j] = power - first;
      sum += power;  // exact up to 512 terms, whatever their order
    }
    total[i] = sum;
  });
}

// y = clamp(floor(floor((high + low) reciprocal + 1/2) gain + 1/2), low_end, high_end) scale
void fq_mean(const float* high, const float* low, const float* total, float* out, int64_t rows, int64_t c,
             double gain, const float* low_end, const float* high_end, const float* scale) {
  for_rows(rows, c, [=](int64_t i) {
    const float *h = high + i * c, *l = low + i * c;
    float* y = out + i * c;
    const double one = 32768.0;
    const double reciprocal = std::floor(17592186044416.0 / (total[i] * one)) * (1.0 / 268435456.0);
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) {
      const double sums = (static_cast<double>(h[j]) + static_cast<double>(l[j])) * one;
      const double mean = std::floor(sums * reciprocal + 0.5);
      y[j] = clamped(std::floor(mean * gain + 0.5), low_end[j], high_end[j]) * scale[j];
    }
  });
}

// intmath.int_layernorm and the grid of its result; out may be x
void fq_layernorm(const float* x, float* out, int64_t rows, int64_t c, float finest, double guard, double root_bits,
                  const double* gain, const double* offset, const float* low, const float* high, const float* scale) {
  const double spread = std::exp2(2 * root_bits), numerator = std::exp2(45 + root_bits);
  for_rows(rows, c, [=](int64_t i) {
    thread_local std::vector<float> steps;
    steps.resize(c);
    const float* a = x + i * c;
    float *u = steps.data(), *y = out + i * c;
    double sum = 0.0, squares = 0.0;
#pragma omp simd reduction(+ : sum, squares)
    for (int64_t j = 0; j < c; ++j) {
      u[j] = std::nearbyint(a[j] / finest);
      const double wide = u[j];  // squares may pass 2**24, which a float does not hold; their sum stays below 2**53
      sum += wide;
      squares += wide * wide;
    }
    const double variance = c * squares - sum * sum;
    double radicand = std::floor((variance + guard) * spread);
    radicand = radicand > 4503599627370496.0 ? 4503599627370496.0 : radicand;
    double root = std::floor(std::sqrt(radicand));
    root = root < 1.0 ? 1.0 : root;
    const double reciprocal = std::floor(numerator / root) * (1.0 / 536870912.0);  // 16 - 45 bits
    const double channels = static_cast<double>(c);
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) {
      const double x_hat = std::floor((channels * u[j] - sum) * reciprocal + 0.5);
      y[j] = clamped(std::floor(x_hat * gain[j] + offset[j]), low[j], high[j]) * scale[j];
    }
  });
}

}  // extern "C"
