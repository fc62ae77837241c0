// The limits of this machine: multiply-adds per second, and bytes read per second.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <vector>

#include "longspan/amx.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/simd/tile_unit.hpp"
#include "longspan/execution.hpp"
#include "support/owned_tensor.hpp"
#include "support/timing.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace bench {

#if defined(_OPENMP)
inline constexpr Index most_threads = 1024;
#else
inline constexpr Index most_threads = 1;
#endif
inline Index default_threads() { return longspan::openmp{}.workers(); }

/// The time from a common start of `threads` threads until all of them have finished work(thread).
template <class Work>
double team_seconds([[maybe_unused]] Index threads, const Work& work) {
#if defined(_OPENMP)
  double start = 0, end = 0;
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
#pragma omp barrier
    if (omp_get_thread_num() == 0) start = seconds_now();
#pragma omp barrier
    work(static_cast<Index>(omp_get_thread_num()));
#pragma omp barrier
    if (omp_get_thread_num() == 0) end = seconds_now();
  }
  return end - start;
#else
  return seconds_of([&] { work(Index{0}); });
#endif
}

namespace detail {

/// Keeps a result alive: the compiler must assume that it is used.
inline void keep(float x) {
  static std::atomic<float> kept{0};
  kept.store(x, std::memory_order_relaxed);
}

/// The number of independent sums that stay in registers with the two factors. A multiply-add takes 4 cycles and
/// two start in each cycle, so 8 would suffice with perfect scheduling; 24 do not need it.
inline constexpr int fma_chains = longspan::detail::vector_registers == 32 ? 24 : 12;

/// `rounds` times fma_chains multiply-adds. Not inlined, so that all threads run the same loop.
template <class Real>
[[gnu::noinline]] Real multiply_add(Index rounds, const Real* start) {
  using longspan::detail::broadcast;
  using longspan::detail::Packet;
  constexpr int width = longspan::detail::lanes<Real>;
  Packet<Real> sum[fma_chains];
  LONGSPAN_UNROLL
  for (int c = 0; c < fma_chains; ++c) sum[c] = longspan::detail::load(start + c);
  const Packet<Real> rescale = broadcast(start[0]), add = broadcast(start[1]);
  LONGSPAN_NO_UNROLL
  for (Index n = 0; n < rounds; ++n) {
    LONGSPAN_UNROLL
    for (int c = 0; c < fma_chains; ++c) sum[c] = longspan::detail::fma(sum[c], rescale, add);
  }
  LONGSPAN_UNROLL
  for (int c = 1; c < fma_chains; ++c) sum[0] = sum[0] + sum[c];
  Real lanes[static_cast<std::size_t>(width)];
  longspan::detail::store(static_cast<Real*>(lanes), sum[0]);
  return lanes[0];
}

#if defined(__AVX512BF16__)
/// The same for the bf16 dot product, 2 multiply-adds per lane.
[[gnu::noinline]] inline float dot_bf16(Index rounds, const float* start) {
  constexpr int chains = 24;
  __m512 sum[chains];
  LONGSPAN_UNROLL
  for (int c = 0; c < chains; ++c) sum[c] = _mm512_loadu_ps(start + c);
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(start[0]), _mm512_set1_ps(start[1]));
  LONGSPAN_NO_UNROLL
  for (Index n = 0; n < rounds; ++n) {
    LONGSPAN_UNROLL
    for (int c = 0; c < chains; ++c) sum[c] = _mm512_dpbf16_ps(sum[c], a, a);
  }
  LONGSPAN_UNROLL
  for (int c = 1; c < chains; ++c) sum[0] = _mm512_add_ps(sum[0], sum[c]);
  return _mm512_cvtss_f32(sum[0]);
}
#endif

#if defined(LONGSPAN_TARGETS_AMX)
/// The same for matrix tiles: six accumulators, all operands in registers.
[[gnu::noinline]] inline void multiply_tiles(Index rounds) {
  using Unit = longspan::detail::HardwareTiles;
  const Unit::Scope configured;
  alignas(64) const std::array<float, 256> zeros{};
  Unit::load<6>(zeros.data(), 64);
  Unit::load<7>(zeros.data(), 64);
  Unit::zero<0>(), Unit::zero<1>(), Unit::zero<2>(), Unit::zero<3>(), Unit::zero<4>(), Unit::zero<5>();
  for (Index n = 0; n < rounds; ++n) {
    Unit::add_products<0, 6, 7>(), Unit::add_products<1, 6, 7>(), Unit::add_products<2, 6, 7>();
    Unit::add_products<3, 6, 7>(), Unit::add_products<4, 6, 7>(), Unit::add_products<5, 6, 7>();
  }
}
#endif

/// Start values: the factor, the addend, then different numbers, because the compiler might merge equal chains.
inline std::array<float, 64> chain_starts() {
  std::array<float, 64> start{};
  for (std::size_t i = 2; i < start.size(); ++i) start[i] = 0.01f * static_cast<float>(i);
  start[0] = 0.999f;
  start[1] = 0.001f;
  return start;
}

/// Work per second of `work(rounds)`, which does `unit` per round on every thread of a team, in a sample of
/// `seconds`. The number of rounds is found on one thread as the best of three, so that a moment in which another
/// program has the core does not make the sample too short.
template <class Work>
double team_rate(Index threads, double unit, double seconds, const Work& work) {
  Index rounds = 500;
  double taken = 0;
  while (taken < seconds / 20) {
    rounds *= 2;
    taken = seconds_of([&] { work(rounds); });
    for (int again = 0; again < 2; ++again) taken = std::min(taken, seconds_of([&] { work(rounds); }));
  }
  rounds = std::max(rounds, static_cast<Index>(static_cast<double>(rounds) * seconds / taken));
  taken = team_seconds(threads, [&](Index) { work(rounds); });
  return unit * static_cast<double>(rounds) * static_cast<double>(threads) / taken;
}

/// The sum of `count` floats, a multiple of 8 packets: 8 loads in flight, and only loads in the loop.
[[gnu::noinline]] inline float sum_of(const float* from, Index count) {
  using longspan::detail::broadcast;
  constexpr int streams = 8, width = longspan::detail::lanes<float>;
  longspan::detail::Packet<float> sum[streams];
  LONGSPAN_UNROLL
  for (int s = 0; s < streams; ++s) sum[s] = broadcast(0.0f);
  LONGSPAN_NO_UNROLL
  for (Index i = 0; i < count; i += streams * width) {
    LONGSPAN_UNROLL
    for (int s = 0; s < streams; ++s) sum[s] = sum[s] + longspan::detail::load(from + i + s * width);
  }
  LONGSPAN_UNROLL
  for (int s = 1; s < streams; ++s) sum[0] = sum[0] + sum[s];
  float lanes[static_cast<std::size_t>(width)];
  longspan::detail::store(static_cast<float*>(lanes), sum[0]);
  return lanes[0];
}

}  // namespace detail

/// One sample of the f32 multiply-adds of a team, in FLOP/s.
inline double fma_peak(Index threads, double seconds = 0.01) {
  const std::array<float, 64> start = detail::chain_starts();
  constexpr double unit = 2.0 * detail::fma_chains * longspan::detail::lanes<float>;
  return detail::team_rate(threads, unit, seconds,
                           [&](Index rounds) { detail::keep(detail::multiply_add(rounds, start.data())); });
}

/// bf16 dot products of a team, in FLOP/s; 0 if the build does not have the instruction.
inline double bf16_dot_peak([[maybe_unused]] Index threads, [[maybe_unused]] double seconds = 0.01) {
#if defined(__AVX512BF16__)
  const std::array<float, 64> start = detail::chain_starts();
  return detail::team_rate(threads, 64.0 * 24, seconds,
                           [&](Index rounds) { detail::keep(detail::dot_bf16(rounds, start.data())); });
#else
  return 0;
#endif
}

/// bf16 products by matrix tiles (AMX) of a team, in FLOP/s; 0 if the build or the process has no tiles.
inline double tile_peak([[maybe_unused]] Index threads, [[maybe_unused]] double seconds = 0.01) {
#if defined(LONGSPAN_TARGETS_AMX)
  if (!longspan::request_amx()) return 0;
  return detail::team_rate(threads, 6 * 2.0 * 16 * 16 * 32, seconds,
                           [](Index rounds) { detail::multiply_tiles(rounds); });
#else
  return 0;
#endif
}

/// The rate of the fastest bf16 instruction of this machine; that of float if there is none.
inline double bf16_peak(Index threads) {
  const double dot = bf16_dot_peak(threads, 0.005), tiles = tile_peak(threads, 0.005);
  return dot + tiles > 0 ? std::max(dot, tiles) : fma_peak(threads);
}

/// Bytes read per second by a team of threads, each from its own part of one array. (Two threads, one array: 45-68
/// GB/s, the same offset in two 2-MB-aligned arrays: only 27-37 GB/s.)
class StreamRead {
 public:
  StreamRead(Index threads, std::size_t bytes_per_thread)
      : threads_(threads),
        floats_(static_cast<Index>(bytes_per_thread / sizeof(float)) / step * step),
        memory_(1, 1, threads, floats_) {
    // Written once, because all pages that were never written share one page of zeros.
    for (float& x : memory_.values()) x = 1;
  }

  /// One sample of about `seconds`, in whole passes over the array.
  double sample(double seconds = 0.05) const {
    Index passes = 1;
    for (;;) {
      const double taken = team_seconds(threads_, [&](Index thread) {
        for (Index n = 0; n < passes; ++n)
          detail::keep(detail::sum_of(memory_.view().row(0, 0, thread), floats_));
      });
      if (taken >= seconds || passes > Index{1} << 40) return bytes() * static_cast<double>(passes) / taken;
      passes *= taken > 0 ? std::clamp<Index>(static_cast<Index>(1.2 * seconds / taken), 2, 1000) : 1000;
    }
  }

  double bytes() const { return static_cast<double>(threads_ * floats_) * sizeof(float); }

 private:
  static constexpr Index step = 8 * longspan::detail::lanes<float>;
  Index threads_, floats_;
  OwnedTensor<float> memory_;
};

/// The best of several samples: disturbances only lower a sample, and the roof is what can be reached.
template <class Sample>
double best_of(int samples, const Sample& sample) {
  double best = 0;
  for (int i = 0; i < samples; ++i) best = std::max(best, sample());
  return best;
}

/// The roof while `timed` ran: the median of eight samples, half of them before it and half after it. A core's
/// clock varies by a tenth within seconds, and calls are timed by their mean, so the best sample would be
/// the roof of another clock.
template <class Sample, class Timed>
double roof_around(const Sample& sample, const Timed& timed) {
  std::vector<double> samples;
  for (int i = 0; i < 4; ++i) samples.push_back(sample());
  timed();
  for (int i = 0; i < 4; ++i) samples.push_back(sample());
  return median(samples);
}

}  // namespace bench
