// Attention inside an inference engine that has its own key-value cache and thread pool: the kernels read the cache in
// place and run on the engine's threads.
//
// After copying, change: Cache, to the layout of yours (a view is a pointer, four sizes and three strides);
// ThreadPool, to two member functions around yours; and `projected`, which stands for your model.

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <functional>
#include <longspan/longspan.hpp>
#include <mutex>
#include <thread>
#include <vector>

using longspan::Index;
using longspan::TensorView;

/// One buffer for all layers and sequences, [layers][sequences][room][keys, values][kv_heads][head_dim]: the keys and
/// values of a token are adjacent, as in many engines.
struct Cache {
  Index layers, sequences, room, kv_heads, head_dim;
  std::vector<Eigen::half> rows =
      std::vector<Eigen::half>(static_cast<std::size_t>(layers * sequences * room * 2 * kv_heads * head_dim));

  /// The tokens [first, first + count) of a layer, for all sequences: [sequences, kv_heads, count, head_dim].
  TensorView<Eigen::half> keys(Index layer, Index first, Index count) { return view(layer, 0, first, count); }
  TensorView<Eigen::half> values(Index layer, Index first, Index count) {
    return view(layer, 1, first, count);
  }

 private:
  TensorView<Eigen::half> view(Index layer, Index which, Index first, Index count) {
    const Index half_token = kv_heads * head_dim, token = 2 * half_token, sequence = room * token;
    return {rows.data() + layer * sequences * sequence + first * token + which * half_token,
            sequences,
            kv_heads,
            count,
            head_dim,
            sequence,
            head_dim,
            token};
  }
};

/// Threads that sleep between jobs.
class ThreadPool {
 public:
  explicit ThreadPool(Index threads) {
    for (Index n = 1; n < threads; ++n) threads_.emplace_back([this, n] { serve(n); });
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() {
    start(nullptr);
    for (std::thread& thread : threads_) thread.join();
  }

  Index size() const { return static_cast<Index>(threads_.size()) + 1; }

  /// Calls job(n) on each thread, where n is the number of the thread; the caller is number 0. Returns when all have
  /// finished.
  void run(const std::function<void(Index)>& job) {
    start(&job);
    job(0);
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [&] { return working_ == 0; });
  }

 private:
  void start(const std::function<void(Index)>* job) {
    const std::lock_guard lock(mutex_);
    job_ = job;
    working_ = threads_.size();
    ++jobs_;
    started_.notify_all();
  }
  void serve(Index number) {
    for (long done = 0;;) {
      std::unique_lock lock(mutex_);
      started_.wait(lock, [&] { return jobs_ != done; });
      done = jobs_;
      const auto* job = job_;
      lock.unlock();
      if (job == nullptr) return;
      (*job)(number);
      lock.lock();
      if (--working_ == 0) finished_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable started_, finished_;
  const std::function<void(Index)>* job_ = nullptr;
  std::size_t working_ = 0;
  long jobs_ = 0;
  std::vector<std::thread> threads_;
};

/// The pool as an executor of Longspan.
struct OnPool {
  ThreadPool* pool;

  Index workers() const { return pool->size(); }

  template <class Task>
  void for_each(Index tasks, Task&& task) const {
    std::atomic<Index> next{0};
    pool->run([&](Index worker) {
      for (Index t = next++; t < tasks; t = next++) task(t, worker);
    });
  }
};

/// Writes the rows of the tokens [first, first + x.rows) of a layer, in place of a projection.
template <class T>
static void projected(TensorView<T> x, Index layer, Index first, double frequency) {
  for (Index b = 0; b < x.batch; ++b) {
    for (Index h = 0; h < x.heads; ++h) {
      for (Index i = 0; i < x.rows; ++i) {
        for (Index c = 0; c < x.cols; ++c) {
          const auto n = static_cast<double>((first + i) * 131 + b * 17 + h * 7 + layer * 3 + c * c);
          x.row(b, h, i)[c] = static_cast<T>(static_cast<float>(std::sin(frequency * n)));
        }
      }
    }
  }
}

/// Runs a prompt and then single tokens through all layers; returns the sum of the last layer's outputs.
template <class Execution>
static double decode(Cache& cache, Index heads, Index prompt, Index length, Execution& execution) {
  const longspan::softmax_attention attend{longspan::causal{}};
  const Index d = cache.head_dim;
  std::vector<float> q_rows(static_cast<std::size_t>(cache.sequences * prompt * heads * d)), out_rows(q_rows);
  double sum = 0;
  for (Index first = 0, count = prompt; first < length; first += count, count = 1) {
    // The memory order is [sequences][tokens][heads][head_dim], as projections write it.
    const TensorView<float> q{q_rows.data(), cache.sequences, heads, count, d, count * heads * d, d,
                              heads * d};
    TensorView<float> out = q;
    out.data = out_rows.data();
    for (Index layer = 0; layer < cache.layers; ++layer) {
      projected(q, layer, first, 0.3);
      projected(cache.keys(layer, first, count), layer, first, 0.2);
      projected(cache.values(layer, first, count), layer, first, 0.1);
      attend(q, cache.keys(layer, 0, first + count), cache.values(layer, 0, first + count), out, execution);
    }
    for (Index n = 0; n < cache.sequences * count * heads * d; ++n)
      sum += static_cast<double>(out.data[n]) * static_cast<double>(1 + n % 7);
  }
  return sum;
}

int main() {
  const Index heads = 8, prompt = 500, length = 530;
  Cache cache{.layers = 4, .sequences = 2, .room = 1024, .kv_heads = 2, .head_dim = 64};
  ThreadPool pool(4);
  longspan::Execution on_pool{OnPool{&pool}};
  longspan::Execution on_caller{longspan::serial{}};

  const double sum = decode(cache, heads, prompt, length, on_pool);
  std::printf("%td tokens of %td sequences through %td layers: %.6f\n", length, cache.sequences, cache.layers,
              sum);
  const bool same = decode(cache, heads, prompt, length, on_caller) == sum;
  std::printf("on the caller's thread alone: %s\n", same ? "the same bits" : "DIFFERENT");
  return same ? 0 : 1;
}
