// The two reductions of Batch Normalization in one read of memory, over all threads.
//
//   sums:  (sum_r z, sum_r z^2)     z = float32(x) - K
//   pair:  (sum_r t, sum_r z t)     with a gate: t where z A + B > 0, and 0 elsewhere
//
// x, t: [R, C] row by row, each float32, bfloat16 or float16; K, A, B and the results: [C] float32.
//
// The rows are cut into chunks, by the shape and dtype alone, so that results do not depend on how
// many threads there are. Inside a chunk, float32 accumulators take kBlock rows at most, a few at a
// time, before they are added to float64 totals: the error does not grow with R.
//
// Remarks on speed are GB/s read by one core of an AMD EPYC 9004 (Zen 4), GCC 12, AVX-512.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#define JBN_INLINE inline __attribute__((always_inline))

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kBlock = 64;    // rows between two additions to the float64 totals
constexpr int64_t kPanel = 1024;  // channels whose accumulators and vectors stay in the L1 cache
constexpr int64_t kNarrow = 64;   // fewer channels than this: several rows are read as one
constexpr int64_t kLine = 64;     // bytes of a cache line
constexpr int64_t kAhead = 1 << 13;       // bytes of float32 between what is read and prefetched
constexpr int64_t kShortRow = 512;        // channels; longer rows are read eight side by side
constexpr int64_t kChunkBytes = 1 << 19;  // enough work to be worth another thread
constexpr int64_t kChunkRows = 256;       // at least: a chunk writes 16 bytes for each channel
constexpr int64_t kMaxChunks = 64;

// One element, as float32, without a table or a branch: every compiler vectorises that.

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Float32 {
  using Stored = float;
  static float load(float value) { return value; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static float load(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
  using Stored = uint16_t;
  static float load(uint16_t bits) {
    constexpr uint32_t kExponent = 31u << 23;  // float16's exponent, in its place in float32
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    const uint32_t exponent = magnitude & kExponent;
    const uint32_t normal = magnitude + (112u << 23);  // 112: from one exponent bias to the other
    const uint32_t special = normal + (112u << 23);    // infinity and NaN
    // Subnormal: the bits are an integer times 2^-24.
    const float tiny = static_cast<float>(static_cast<int32_t>(bits & 0x3ffu)) * 0x1p-24f;
    uint32_t tiny_bits;
    std::memcpy(&tiny_bits, &tiny, sizeof tiny);
    uint32_t result = exponent == kExponent ? special : normal;
    result = exponent == 0 ? tiny_bits : result;
    return from_bits(result | (static_cast<uint32_t>(bits & 0x8000u) << 16));
  }
};

// Asks for elements to be brought to the L2 cache. Short rows that are read side by side are in one
// page, and processors do not guess by themselves that they go on in the next: with this, sums of
// [25088, 256] float32 go from 14 to 29 GB/s, and pairs in bfloat16 from 13 to 26.
// Inlined by force: GCC drops calls of functions that do nothing else.
template <class Stored>
JBN_INLINE void prefetch(const Stored* from, int64_t elements) {
  constexpr int64_t kStep = kLine / sizeof(Stored);
  for (int64_t i = 0; i < elements; i += kStep) __builtin_prefetch(from + i, 0, 2);
}

// What to add up: the two terms of one element, and how many short rows to read side by side, so
// that accumulators are loaded once for all of them. Per-channel vectors are those of a panel.

struct Operands {
  const void* x;
  const void* t;         // pair only
  const float* vectors;  // [3, width]: K, A, B
  int64_t width;
};

template <class X>
struct SumTerms {
  static constexpr int64_t kSideBySide = 4;
  const typename X::Stored* __restrict__ x;
  const float* __restrict__ shift;

  SumTerms(const Operands& in, int64_t first, int64_t channel)
      : x(static_cast<const typename X::Stored*>(in.x) + first), shift(in.vectors + channel) {}

  JBN_INLINE void fetch(int64_t i, int64_t elements) const { prefetch(x + i, elements); }

  inline void add(int64_t i, int64_t c, float& sum, float& square) const {
    const float z = X::load(x[i]) - shift[c];
    sum += z;
    square += z * z;
  }
};

template <class X, class T, bool kGated>
struct PairTerms {
  // [25088, 256]: 18 with two rows, 13 with four or eight. Half precision has more to compute.
  static constexpr int64_t kSideBySide = sizeof(typename X::Stored) == 4 ? 2 : 4;
  const typename X::Stored* __restrict__ x;
  const typename T::Stored* __restrict__ t;
  const float* __restrict__ shift;
  const float* __restrict__ scale;
  const float* __restrict__ bias;

  PairTerms(const Operands& in, int64_t first, int64_t channel)
      : x(static_cast<const typename X::Stored*>(in.x) + first),
        t(static_cast<const typename T::Stored*>(in.t) + first),
        shift(in.vectors + channel),
        scale(shift + in.width),
        bias(scale + in.width) {}

  JBN_INLINE void fetch(int64_t i, int64_t elements) const {
    prefetch(x + i, elements);
    prefetch(t + i, elements);
  }

  inline void add(int64_t i, int64_t c, float& sum, float& product) const {
    const float z = X::load(x[i]) - shift[c];
    float value = T::load(t[i]);
    if constexpr (kGated) value = z * scale[c] + bias[c] > 0 ? value : 0.0f;
    sum += value;
    product += z * value;
  }
};

template <int64_t kRows, class Terms>
inline void add_rows(const Terms& terms, int64_t row, int64_t width, int64_t channels,
                     float* __restrict__ first, float* __restrict__ second) {
  for (int64_t c = 0; c < channels; ++c) {
    float a = 0, b = 0;  // summed apart first: two short sums round less than a long one
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) terms.add((row + r) * width + c, c, a, b);
    first[c] += a;
    second[c] += b;
  }
}

struct Tile {
  int64_t row, rows, channel, channels;  // at most kPanel channels
};

// Adds the terms of a tile to totals: [2, width].
template <int64_t kRows, bool kFetch, class Terms>
void add_tile(const Operands& in, const Tile& tile, double* totals) {
  float first[kPanel], second[kPanel];
  const int64_t ahead = std::max<int64_t>(kRows, kAhead / 4 / in.width);
  for (int64_t done = 0; done < tile.rows; done += kBlock) {
    const int64_t rows = std::min(kBlock, tile.rows - done);
    const Terms terms(in, (tile.row + done) * in.width + tile.channel, tile.channel);
    std::fill_n(first, tile.channels, 0.0f);
    std::fill_n(second, tile.channels, 0.0f);
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      if (kFetch && done + r + ahead + kRows <= tile.rows)
        terms.fetch((r + ahead) * in.width, kRows * in.width);
      add_rows<kRows>(terms, r, in.width, tile.channels, first, second);
    }
    for (; r < rows; ++r) add_rows<1>(terms, r, in.width, tile.channels, first, second);
    double* total = totals + tile.channel;
    for (int64_t c = 0; c < tile.channels; ++c) total[c] += first[c];
    total += in.width;
    for (int64_t c = 0; c < tile.channels; ++c) total[c] += second[c];
  }
}

template <class Terms>
void accumulate(const Operands& in, const Tile& tile, double* totals) {
  if (in.width > kShortRow) {
    add_tile<8, false, Terms>(in, tile, totals);
  } else {  // of one panel, so what is needed next comes next in memory
    add_tile<Terms::kSideBySide, true, Terms>(in, tile, totals);
  }
}

using Accumulate = void (*)(const Operands&, const Tile&, double*);

// Chunks of work for whoever comes: the caller, and what threads of XLA's pool are free. A thread
// claims a chunk before it works on it, so nobody ever waits for one that has not begun; a task
// that the pool starts too late finds nothing to claim, and touches nothing but this.
class Chunks {
 public:
  Chunks(int64_t count, std::function<void(int64_t)> work)
      : count_(count), remaining_(count), work_(std::move(work)) {}

  void run() {
    for (int64_t i = next_++; i < count_; i = next_++) {
      work_(i);
      if (--remaining_ == 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_all();
      }
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return remaining_ == 0; });
  }

 private:
  const int64_t count_;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> remaining_;
  std::function<void(int64_t)> work_;
  std::mutex mutex_;
  std::condition_variable finished_;
};

void parallel(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> work) {
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  const auto chunks = std::make_shared<Chunks>(count, std::move(work));
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([chunks] { chunks->run(); });
  chunks->run();
  chunks->wait();
}

// The same vector `fold` times, one after the other.
void repeat(const float* vector, int64_t channels, int64_t fold, float* out) {
  for (int64_t i = 0; i < fold; ++i) std::copy_n(vector, channels, out + i * channels);
}

// How an array is cut into tiles: chunks of rows, and panels of channels.
struct Cut {
  int64_t rows, width, chunk_rows, chunks, panels;

  Cut(int64_t rows, int64_t width, int64_t element_bytes) : rows(rows), width(width) {
    const int64_t panel_bytes = std::min(width, kPanel) * element_bytes;
    chunk_rows = std::max({kChunkRows, kChunkBytes / panel_bytes, rows / kMaxChunks + 1});
    chunks = (rows + chunk_rows - 1) / chunk_rows;
    panels = (width + kPanel - 1) / kPanel;
  }

  Tile tile(int64_t chunk, int64_t panel) const {
    const int64_t row = chunk * chunk_rows, channel = panel * kPanel;
    return {row, std::min(chunk_rows, rows - row), channel, std::min(kPanel, width - channel)};
  }
};

void reduce(ffi::ThreadPool& pool, Accumulate accumulate, Operands in, int64_t element_bytes,
            int64_t rows, int64_t channels, const std::vector<const float*>& vectors,
            float* first, float* second) {
  if (channels == 0) return;
  // Narrow arrays are read as [R / fold, fold C]; the rows that are left over, as one wide row.
  const int64_t fold = channels < kNarrow ? 2 * kNarrow / channels : 1;
  const Cut cut(rows / fold, fold * channels, element_bytes);
  std::vector<float> repeated(3 * cut.width);
  for (size_t i = 0; i < vectors.size(); ++i)
    repeat(vectors[i], channels, fold, repeated.data() + i * cut.width);
  in.vectors = repeated.data();
  in.width = cut.width;
  std::vector<double> totals(std::max<int64_t>(cut.chunks, 1) * 2 * cut.width, 0.0);
  parallel(pool, cut.chunks * cut.panels, [&](int64_t i) {
    const int64_t chunk = i / cut.panels;
    accumulate(in, cut.tile(chunk, i % cut.panels), totals.data() + chunk * 2 * cut.width);
  });
  accumulate(in, {cut.rows, 1, 0, rows % fold * channels}, totals.data());
  for (int64_t chunk = 1; chunk < cut.chunks; ++chunk)
    for (int64_t i = 0; i < 2 * cut.width; ++i) totals[i] += totals[chunk * 2 * cut.width + i];
  for (int64_t c = 0; c < channels; ++c) {
    double a = 0, b = 0;
    for (int64_t i = c; i < cut.width; i += channels) {
      a += totals[i];
      b += totals[cut.width + i];
    }
    first[c] = static_cast<float>(a);
    second[c] = static_cast<float>(b);
  }
}

// Which instance of a template: by the element types.

template <class Make>
Accumulate by_type(ffi::DataType dtype, Make make) {
  switch (dtype) {
    case ffi::F32: return make(Float32{});
    case ffi::BF16: return make(BFloat16{});
    case ffi::F16: return make(Float16{});
    default: return nullptr;
  }
}

template <bool kGated>
Accumulate pair_of(ffi::DataType x, ffi::DataType t) {
  return by_type(x, [t](auto x_type) {
    return by_type(t, [](auto t_type) -> Accumulate {
      return accumulate<PairTerms<decltype(x_type), decltype(t_type), kGated>>;
    });
  });
}

Accumulate sum_of(ffi::DataType x) {
  return by_type(x, [](auto x_type) -> Accumulate {
    return accumulate<SumTerms<decltype(x_type)>>;
  });
}

using Vector = ffi::Buffer<ffi::F32, 1>;
using Result = ffi::Result<Vector>;

ffi::Error run(ffi::ThreadPool& pool, Accumulate accumulate, const ffi::AnyBuffer& x,
               const ffi::AnyBuffer* t, std::vector<const Vector*> vectors, Result& first,
               Result& second) {
  if (accumulate == nullptr)
    return ffi::Error::InvalidArgument("expected float32, bfloat16 or float16");
  if (x.dimensions().size() == 0) return ffi::Error::InvalidArgument("expected [..., C], got []");
  const int64_t channels = x.dimensions().back();
  if (t != nullptr && t->element_count() != x.element_count())
    return ffi::Error::InvalidArgument("expected t of the shape of x");
  std::vector<const float*> data;
  for (const Vector* vector : vectors) {
    if (static_cast<int64_t>(vector->element_count()) != channels)
      return ffi::Error::InvalidArgument("expected vectors of shape [C]");
    data.push_back(vector->typed_data());
  }
  if (channels == 0) return ffi::Error::Success();
  const int64_t rows = static_cast<int64_t>(x.element_count()) / channels;
  const int64_t bytes = ffi::ByteWidth(x.element_type()) +
                        (t == nullptr ? 0 : ffi::ByteWidth(t->element_type()));
  const Operands in{x.untyped_data(), t == nullptr ? nullptr : t->untyped_data(), nullptr, 0};
  reduce(pool, accumulate, in, bytes, rows, channels, data, first->typed_data(),
         second->typed_data());
  return ffi::Error::Success();
}

ffi::Error sums(ffi::ThreadPool pool, ffi::AnyBuffer x, Vector shift, Result first,
                Result second) {
  return run(pool, sum_of(x.element_type()), x, nullptr, {&shift}, first, second);
}

ffi::Error pair(ffi::ThreadPool pool, ffi::AnyBuffer x, Vector shift, ffi::AnyBuffer t,
                Result first, Result second) {
  return run(pool, pair_of<false>(x.element_type(), t.element_type()), x, &t, {&shift}, first,
             second);
}

ffi::Error gated_pair(ffi::ThreadPool pool, ffi::AnyBuffer x, Vector shift, ffi::AnyBuffer t,
                      Vector scale, Vector bias, Result first, Result second) {
  return run(pool, pair_of<true>(x.element_type(), t.element_type()), x, &t,
             {&shift, &scale, &bias}, first, second);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbn_sums, sums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Vector>()
                                  .Ret<Vector>()
                                  .Ret<Vector>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbn_pair, pair,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Vector>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<Vector>()
                                  .Ret<Vector>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jbn_gated_pair, gated_pair,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Vector>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Vector>()
                                  .Arg<Vector>()
                                  .Ret<Vector>()
                                  .Ret<Vector>());
