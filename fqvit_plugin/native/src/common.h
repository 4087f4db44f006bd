// What the steps are made of, and how threads share them. steps.py mirrors the structs; fq_size compares the sizes.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "simd.h"

namespace fq {

// A place in the arena is an offset for one image; image b of a batch of B stands at (offset * B + b * size).

// Channels with an escape: the byte `end` stands for `value`, a byte too but for its size; -1: no byte does. They are few,
// so they are done again, one by one, after the vectors.
struct Escapes {
  int64_t count;
  const int32_t* channel;  // [count], ascending
  const int32_t* end;      // [count]
  const int32_t* value;    // [count]
};

// 32-bit sums to codes: floor(sum * gain + offset) + zero, clamped, then through a table if there is one.
struct Requant {
  const double* gain;    // [columns]
  const double* offset;  // [columns], with the half that rounds
  const int32_t* zero;   // [columns]
  const uint8_t* table;  // or null; three more bytes may be read behind it
  int64_t low, high;
  int64_t wide;  // whether floor(...) may pass 32 bits
  Escapes far;
};

// A residual sum of bytes: floor(a * gain_a + b * gain_b + offset), clamped.
struct Sum {
  const double* gain_a;  // [columns]
  const double* gain_b;
  const double* offset;
  int64_t low, high;
  Escapes far_a, far_b, far;  // of the same channels
};

// y = requant(x W^T), and a residual sum with what stands at y's place in `residual`.
struct Gemm {
  int64_t x, y, residual;  // residual < 0: none
  int64_t rows, columns, depth;
  int64_t out_rows;          // of y, for each image
  const int32_t* map;        // row of x -> row of y, or -1; null: the same
  const int8_t* weight;      // fq_pack's
  const int32_t* start;      // [columns], of each sum: takes the zero point off
  Requant requant;
  Sum sum;
};

// Log-Int-Softmax attention of heads side by side: rows of q, k, v lie in one or several tensors.
struct Attention {
  int64_t q, k, v, y;                      // places
  int64_t q_first, k_first, v_first;       // bytes to head 0
  int64_t q_row, k_row, v_row, y_row;      // bytes from token to token
  int64_t q_head, k_head, v_head, y_head;  // bytes from head to head
  int64_t q_size, k_size, v_size, y_size;  // bytes of a group: one image or one window
  int64_t groups, heads, queries, keys, depth, value_depth;
  int64_t zero_q, zero_k, zero_v;  // stored zero points
  Requant logits;                  // one entry each
  const uint8_t* bias;             // or null: [heads][queries][keys], summed onto the logits
  Sum sum;                         // one entry each; a is the logit
  const uint8_t* mask;             // or null: [masks][queries][keys], 255 where attention is forbidden
  int64_t masks;
  const int8_t* exponents;  // [256]
  double gain;              // of the mean with 16 fractional bits, 2**-shift included
  int64_t out_zero, low, high;
};

// LayerNorm of rows. Row r of y comes from `pieces` rows of x, map[r * pieces ...], side by side, or is `fill` where the
// map has -1. Without a map it comes from row r.
struct Norm {
  int64_t x, y;
  int64_t rows, in_rows, channels, pieces;
  const int32_t* map;     // or null
  const int32_t* factor;  // [channels]
  const int32_t* center;  // [channels]: u = byte * factor - center
  const double* gain;     // [channels], 2**-shift included
  const double* offset;   // [channels], with the half that rounds
  const int32_t* zero;    // [channels]
  const int32_t* whole_gain;
  const int64_t* whole_offset;  // with the half that rounds
  const uint8_t* shifts;
  int64_t guard, root_bits, low, high, fill;
  int64_t wide;  // whether |u| may pass 5700, so that 64 squares do not fit 32 bits
  Escapes far;   // values are u
};

// Runs of bytes from elsewhere: y[i * run ...] = x[index[i] ...], or `fill` where the index is -1.
struct Gather {
  int64_t x, y;
  int64_t in_size, runs, run;
  const int32_t* index;
  int64_t fill;
};

// Constant tokens before the others.
struct Prepend {
  int64_t x, y;
  int64_t in_size, size;
  const uint8_t* tokens;
};

// A residual sum of two tensors, or of one and a constant.
struct Add {
  int64_t a, b, y;
  int64_t rows, columns;
  const uint8_t* constant;  // or null; takes the place of b
  Sum sum;
};

struct Lookup {
  int64_t x, y, size;
  const uint8_t* table;  // [256]
};

// The image's codes: round(x / scale), halves to even, clamped, plus zero.
struct Quantize {
  int64_t y, size;
  double scale;  // a float32
  int64_t low, high, zero;
};

// Sums over the tokens, requantized.
struct Mean {
  int64_t x, y;
  int64_t rows, columns;
  int64_t start;
  Requant requant;
};

struct Step {
  int64_t kind;
  const void* arguments;
};

struct Memory {
  uint8_t* arena;
  const float* image;
  int64_t batch;
  uint8_t* at(int64_t offset) const { return arena + offset * batch; }
};

// Memory of one thread that steps write over.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }
  uint8_t* bytes(size_t size) {
    if (size > size_) {
      std::free(memory_);
      size_ = (size + 4095) / 4096 * 4096;
      memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, size_));
      if (memory_ == nullptr) throw std::bad_alloc();
      std::memset(memory_, 0, size_);
    }
    return memory_;
  }

 private:
  uint8_t* memory_ = nullptr;
  size_t size_ = 0;
};

// Parts of a step that were taken, and that are done.
struct Progress {
  alignas(64) std::atomic<int64_t> taken{0};
  alignas(64) std::atomic<int64_t> done{0};
};

// One step as a thread sees it. Threads take parts as they come, and go on when all parts are done: a thread that the
// system has put aside holds nobody up unless it was put aside with a part in hand.
struct Job {
  const Memory& memory;
  Progress& progress;
  Scratch& scratch;
  int threads;

  // work(part) for every part, by whichever thread
  template <typename Work>
  void parts(int64_t count, Work work) {
    for (;;) {
      int64_t part = progress.taken.fetch_add(1, std::memory_order_relaxed);
      if (part >= count) break;
      work(part);
      progress.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; progress.done.load(std::memory_order_acquire) < count; ++spins) {
      if (spins < 1000)
        rest();
      else
        std::this_thread::yield();
    }
  }

  // work(from, to) over `size` items, at least `smallest` together
  template <typename Work>
  void share(int64_t size, int64_t smallest, Work work) {
    int64_t part = size / (threads * 4) + 1;
    if (part < smallest) part = smallest;
    parts((size + part - 1) / part,
          [&](int64_t i) { work(i * part, (i + 1) * part < size ? (i + 1) * part : size); });
  }

 private:
  static void rest() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
};

}  // namespace fq
