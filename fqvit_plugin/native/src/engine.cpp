// The native engine: runs a list of fused integer steps, all threads in one region from the first to the last.
#include "attention.h"
#include "elementwise.h"
#include "gemm.h"
#include "layernorm.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fq {

template <typename Arguments>
static void run_as(const void* arguments, Job& job) {
  run(*static_cast<const Arguments*>(arguments), job);
}

using Runner = void (*)(const void*, Job&);
// in the order of steps.KINDS
static const Runner RUNNERS[] = {run_as<Gemm>,    run_as<Attention>, run_as<Norm>,     run_as<Gather>, run_as<Prepend>,
                                 run_as<Add>,     run_as<Lookup>,    run_as<Quantize>, run_as<Mean>};
static const int64_t SIZES[] = {sizeof(Gemm), sizeof(Attention), sizeof(Norm),     sizeof(Gather), sizeof(Prepend),
                                sizeof(Add),  sizeof(Lookup),    sizeof(Quantize), sizeof(Mean)};

static void work(const Step* steps, int64_t count, const Memory& memory, Progress* progress, int threads, int thread,
                 double* seconds) {
  Scratch scratch;
  auto last = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < count; ++i) {
    Job job{memory, progress[i], scratch, threads};
    RUNNERS[steps[i].kind](steps[i].arguments, job);
    if (seconds != nullptr && thread == 0) {
      auto now = std::chrono::steady_clock::now();
      seconds[i] += std::chrono::duration<double>(now - last).count();
      last = now;
    }
  }
  release_tiles();
}

}  // namespace fq

extern "C" {

// The instruction set that this build uses on this machine.
const char* fq_isa() { return fq::HAS_AMX ? "amx-int8" : FQ_ISA; }

// Bytes of a struct, by kind; -1 when there is no such kind.
int64_t fq_size(int64_t kind) {
  return kind >= 0 && kind < static_cast<int64_t>(sizeof(fq::SIZES) / sizeof(fq::SIZES[0])) ? fq::SIZES[kind] : -1;
}

// Packs weights [columns][depth]; fq_packed_size bytes. Gives how many columns they fill.
int64_t fq_pack(const int8_t* weight, int64_t columns, int64_t depth, int8_t* out) {
  fq::pack(weight, columns, depth, out);
  return fq::Panels(columns).columns();
}

int64_t fq_packed_size(int64_t columns, int64_t depth) { return fq::Panels(columns).columns() * fq::fours(depth) * 4; }

// Runs the steps; adds to `seconds`, one for each step, if it is not null.
void fq_run(const fq::Step* steps, int64_t count, uint8_t* arena, const float* image, int64_t batch, int threads,
            double* seconds) {
  const fq::Memory memory{arena, image, batch};
  std::vector<fq::Progress> progress(count);
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  fq::work(steps, count, memory, progress.data(), omp_get_num_threads(), omp_get_thread_num(), seconds);
#else
  (void)threads;
  fq::work(steps, count, memory, progress.data(), 1, 0, seconds);
#endif
}
}
