// SPDX-License-Identifier: Apache-2.0
#include "core/thread_pool.hpp"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "core/check.hpp"
#include "core/env.hpp"
#include "msa/backend.hpp"

namespace msa {
namespace core {
namespace {

constexpr int kMaxThreads = 1024;
/// Looks at a flag before a thread goes to sleep, some 50 us: a decode step is a row of short
/// regions, and waking a sleeper took about as long as one of them (docs/kernels/cpu.md).
constexpr int kSpins = 2000;

int default_num_threads() {
  const std::string text = env("MSA_NUM_THREADS");
  if (text.empty()) return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  int value = 0;
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value);
  MSA_CHECK(parsed.ec == std::errc{} && parsed.ptr == end && value >= 1 && value <= kMaxThreads,
            "MSA_NUM_THREADS is '", text, "', expected a number from 1 to ", kMaxThreads);
  return value;
}

class ThreadPool {
 public:
  static ThreadPool& instance() {
    static ThreadPool pool;
    return pool;
  }

  int num_threads() const { return num_threads_.load(std::memory_order_relaxed); }

  void set_num_threads(int count) {
    MSA_CHECK(count >= 1 && count <= kMaxThreads, "set_num_threads: num_threads is ", count,
              ", expected 1 to ", kMaxThreads);
    const std::lock_guard run_lock(run_mutex_);
    stop_workers();
    num_threads_ = count;
  }

  void run(std::int64_t count, void (*task)(void*, std::int64_t, int), void* context) {
    // One parallel region at a time: a second caller waits here, so two engine threads may share
    // the pool without oversubscribing the machine.
    const std::lock_guard run_lock(run_mutex_);
    if (count <= 1 || num_threads() == 1) {
      for (std::int64_t i = 0; i < count; ++i) task(context, i, 0);
      return;
    }
    start_workers();
    {
      const std::lock_guard lock(mutex_);
      task_ = task;
      context_ = context;
      count_ = count;
      next_ = 0;
      open_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_tasks(0);
    // Who has not come by now is not waited for: waking a sleeper takes longer than a small task.
    {
      const std::lock_guard lock(mutex_);
      open_ = false;
    }
    spin_until([this] { return busy_.load(std::memory_order_acquire) == 0; });
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_.load(std::memory_order_acquire) == 0; });
  }

 private:
  ThreadPool() : num_threads_(default_num_threads()) {}
  ~ThreadPool() { stop_workers(); }

  /// Returns when `ready` is true or a sleep would cost little in comparison.
  template <class Ready>
  static void spin_until(Ready ready) {
    for (int i = 0; i < kSpins && !ready(); ++i) {
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  }

  void take_tasks(int worker) {
    for (;;) {
      const std::int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      task_(context_, index, worker);
    }
  }

  void start_workers() {
    for (int worker = static_cast<int>(workers_.size()) + 1; worker < num_threads(); ++worker) {
      workers_.emplace_back([this, worker, seen = generation_.load()]() mutable {
        for (;;) {
          spin_until([&] { return generation_.load(std::memory_order_acquire) != seen; });
          {
            std::unique_lock lock(mutex_);
            wake_.wait(lock, [&] { return stop_ || generation_.load() != seen; });
            if (stop_) return;
            seen = generation_.load();
            if (!open_) continue;
            busy_.fetch_add(1, std::memory_order_relaxed);
          }
          take_tasks(worker);
          const std::lock_guard lock(mutex_);
          if (busy_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
        }
      });
    }
  }

  void stop_workers() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stop_ = false;
  }

  std::atomic<int> num_threads_;
  std::mutex run_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> workers_;
  void (*task_)(void*, std::int64_t, int) = nullptr;
  void* context_ = nullptr;
  std::int64_t count_ = 0;
  std::atomic<std::int64_t> next_{0};
  std::atomic<std::uint64_t> generation_{0};  ///< of parallel regions
  std::atomic<int> busy_{0};                  ///< workers that came to the open region
  bool open_ = false;                         ///< workers may still come
  bool stop_ = false;
};

}  // namespace

void parallel_for(std::int64_t count, void (*task)(void*, std::int64_t, int), void* context) {
  ThreadPool::instance().run(count, task, context);
}

}  // namespace core

void set_num_threads(int num_threads) { core::ThreadPool::instance().set_num_threads(num_threads); }
int num_threads() { return core::ThreadPool::instance().num_threads(); }

}  // namespace msa
