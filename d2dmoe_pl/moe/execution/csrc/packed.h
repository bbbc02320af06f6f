// Weights in the order that matrix units read, packed once a change: rows interleaved ("VNNI"), in pairs of bf16 or in
// fours of int8.
#pragma once

#include "memory_sample.h"
#include "tile_unit.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace d2dmoe {

inline int64_t even(int64_t n) {
  return n + n % 2;
}

// brgemm compiles a kernel for each number of rows: few numbers, and rows too many that nobody reads.
inline int64_t rounded_height(int64_t rows) {
  return rows <= 2 ? rows : (rows + 3) / 4 * 4;
}

// The matrix unit, which ATen's brgemm holds for its thread from the first call on. Copies hold nothing.
struct HeldUnit {
  bool held = false;

  HeldUnit() = default;
  HeldUnit(const HeldUnit&) {}
  ~HeldUnit() { release(); }

  void release() {
    if (held) at::native::cpublas::brgemm_release();
    held = false;
  }
};

// bf16 (E, s, d) to (E, ceil(d / 2), s, 2) if `transposed`, of B = W^T, else to (E, ceil(s / 2), d, 2), of B = W.
inline at::Tensor interleave(const at::Tensor& weight, bool transposed) {
  const int64_t experts = weight.size(0), rows = weight.size(1), columns = weight.size(2);
  const int64_t depth = transposed ? columns : rows, width = transposed ? rows : columns;
  const int64_t row_step = transposed ? 1 : columns, column_step = transposed ? columns : 1;
  at::Tensor packed = at::empty({experts, even(depth) / 2, width, 2}, weight.options());
  const at::BFloat16* in = weight.const_data_ptr<at::BFloat16>();
  at::BFloat16* out = packed.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, experts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      const at::BFloat16* from = in + e * rows * columns;
      at::BFloat16* to = out + e * even(depth) * width;
      for (int64_t k = 0; k < even(depth); ++k) {
        for (int64_t n = 0; n < width; ++n) {
          to[(k / 2 * width + n) * 2 + k % 2] = k < depth ? from[k * row_step + n * column_step] : at::BFloat16(0.f);
        }
      }
    }
  });
  return packed;
}

constexpr int64_t kChunk = 128; // neurons of an expert in int8 that are quantised together; a multiple of 4

// Rows that products may read behind the last, and bytes behind these.
constexpr int64_t kBehind = 15, kLineBehind = 64;

inline int64_t quads(int64_t n) {
  return (n + 3) / 4;
}

// int8 (E, s, d) to (E, ceil(s / 4), d, 4), of B = W.
inline at::Tensor in_quads(const at::Tensor& weight) {
  const int64_t rest = quads(weight.size(1)) * 4 - weight.size(1);
  const at::Tensor padded = at::constant_pad_nd(weight, {0, 0, 0, rest});
  return padded.unflatten(1, {-1, 4}).transpose(2, 3).contiguous(); // (E, s / 4, 4, d) -> (E, s / 4, d, 4)
}

// The same tensor, with a vector of memory that may be read behind it.
inline at::Tensor readable_behind(const at::Tensor& packed) {
  const at::Tensor longer = at::zeros({packed.numel() + 64}, packed.options());
  return longer.narrow(0, 0, packed.numel()).view(packed.sizes()).copy_(packed);
}

#if defined(CPU_CAPABILITY_AVX2)
constexpr int64_t kPanel = 8; // columns, those of a tile
#else
constexpr int64_t kPanel = kHasMatrixUnit ? 16 : 32; // those of a tile; or as many as stay in the first cache
#endif

// The numbers of a column of a panel, of which those behind `depth` are zeros: whole tiles, where there may be any.
inline int64_t panel_depth(int64_t depth) {
  constexpr int64_t kWhole = kHasMatrixUnit ? 64 : 4;
  return (depth + kWhole - 1) / kWhole * kWhole;
}

inline int64_t whole_panels(int64_t columns) {
  return (columns + kPanel - 1) / kPanel * kPanel;
}

// int8 (N, K), or (E, s, K) of E * s = N, to (ceil(N / kPanel), panel_depth(K) / 4, kPanel, 4), of B = W^T, with zeros where
// there is nothing.
inline at::Tensor in_panels(const at::Tensor& given) {
  const at::Tensor weight = given.flatten(0, -2);
  const int64_t rows = weight.size(0), depth = weight.size(1);
  const at::Tensor padded =
      at::constant_pad_nd(weight, {0, panel_depth(depth) - depth, 0, whole_panels(rows) - rows});
  return in_quads(padded.unflatten(0, {-1, kPanel}).transpose(1, 2)); // (panels, K, kPanel)
}

// int8 (E, s, d) to (E, ceil(d / 4), s, 4), of B = W^T; for a matrix unit each expert in panels of its own.
inline at::Tensor of_many_tokens(const at::Tensor& weight) {
  if (!kHasMatrixUnit) return in_quads(weight.transpose(1, 2));
  return in_panels(at::constant_pad_nd(weight, {0, 0, 0, whole_panels(weight.size(1)) - weight.size(1)}));
}

// What tokens and activations around 128 add to products: 128 times the sums of rows, (E, s); or of columns, over
// `kChunk` rows each, (E, chunks, d).
inline at::Tensor row_sums(const at::Tensor& weight) {
  return (weight.sum(-1, /*keepdim=*/false, at::kInt) * 128).contiguous();
}

inline at::Tensor chunk_sums(const at::Tensor& weight) {
  std::vector<at::Tensor> sums;
  for (const at::Tensor& chunk : weight.split(kChunk, 1)) sums.push_back(chunk.sum(1, /*keepdim=*/false, at::kInt) * 128);
  return at::stack(sums, 1).contiguous();
}

// Of int8 (E, s, d) with scales (E, d): the scale of each column (d,) that holds all experts' numbers.
inline at::Tensor joined_scale(const at::Tensor& weight, const at::Tensor& scale) {
  const at::Tensor most = std::get<0>(weight.to(at::kFloat).mul_(scale.unsqueeze(1)).abs_().flatten(0, 1).max(0));
  return at::where(most == 0, at::ones_like(most), most / 127);
}

// The same weight as one linear layer's, (d, E * s), rounded to these scales.
inline at::Tensor joined(const at::Tensor& weight, const at::Tensor& scale) {
  const at::Tensor factors = scale / joined_scale(weight, scale); // (E, d)
  return weight.to(at::kFloat).mul_(factors.unsqueeze(1)).round_().to(at::kChar).flatten(0, 1).t();
}

// Whether that rounds every expert by at most some hundredths of its norm, unlike one that is far smaller than others.
inline at::Tensor joins_well(const at::Tensor& weight, const at::Tensor& scale) {
  constexpr double kMost = 0.03;
  const at::Tensor norm = weight.to(at::kFloat).mul_(scale.unsqueeze(1)).square_().sum({1, 2}); // squared, (E,)
  const at::Tensor step = joined_scale(weight, scale).square().sum() / 12; // the mean square of what rounding leaves
  return (step * weight.size(1)).le(norm * (kMost * kMost)).logical_or(norm.eq(0)).all();
}

// How a copy of a weight (E, s, d) is kept.
enum class Form {
  fp32, pairs, transposed_pairs, quads, transposed_quads, panels, row_sums, chunk_sums,
  joined_panels, joined_scale, joined_sums, joins_well, // of all experts' int8 by common scales
  dequantised_rows, dequantised_columns // of int8, multiplied out
};

inline at::Tensor pack(const at::Tensor& weight, Form form, const std::optional<at::Tensor>& scale) {
  switch (form) {
    case Form::fp32:
      return weight.to(at::kFloat).contiguous();
    case Form::pairs:
    case Form::transposed_pairs: {
      const at::Tensor each = weight.dim() == 2 ? weight.unsqueeze(0) : weight; // a router's are those of one expert
      return interleave(each.to(at::kBFloat16).contiguous(), form == Form::transposed_pairs);
    }
    case Form::quads:
      return in_quads(weight);
    case Form::transposed_quads:
      return readable_behind(of_many_tokens(weight));
    case Form::panels:
      return in_panels(weight);
    case Form::row_sums:
      return row_sums(weight);
    case Form::chunk_sums:
      return chunk_sums(weight);
    case Form::joined_panels:
      return in_panels(joined(weight, *scale));
    case Form::joined_scale:
      return joined_scale(weight, *scale);
    case Form::joined_sums:
      return row_sums(joined(weight, *scale));
    case Form::joins_well:
      return joins_well(weight, *scale);
    case Form::dequantised_rows:
      return weight * scale->unsqueeze(-1); // (E, s, d) * (E, s, 1)
    case Form::dequantised_columns:
      return weight * scale->unsqueeze(1); // (E, s, d) * (E, 1, d)
  }
}

// Packed copies by the weight, and the scale, they were made from, as long as these live and are not written to. They are
// to be given as they are: a view that an operator makes below autograd has no part in what counts changes.
class PackedWeights {
 public:
  at::Tensor get(const at::Tensor& weight, Form form, const std::optional<at::Tensor>& scale = std::nullopt) {
    if (weight.is_inference() || (scale && scale->is_inference())) { // has no version to tell a change by
      TORCH_WARN_ONCE(
          "weights made under torch.inference_mode() are packed anew in each call, which takes most of its time; "
          "load, convert and cast models outside of it, or compile them by d2dmoe_pl.optimize_");
      return pack(weight, form, scale);
    }
    const std::lock_guard<std::mutex> guard(mutex_);
    const Key key{weight.const_data_ptr(), form};
    const auto found = entries_.find(key);
    if (found != entries_.end() && found->second.is_of(weight, scale)) return found->second.packed;
    for (auto entry = entries_.begin(); entry != entries_.end();) { // those whose weight is gone
      entry = entry->second.weight.storage.expired() ? entries_.erase(entry) : std::next(entry);
    }
    at::Tensor packed = pack(weight, form, scale);
    std::optional<Source> factors;
    if (scale) factors.emplace(*scale);
    entries_.insert_or_assign(key, Entry{Source(weight), std::move(factors), packed});
    return packed;
  }

 private:
  using Key = std::pair<const void*, Form>;
  struct Source {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    int64_t version;
    at::ScalarType type;
    std::vector<int64_t> sizes, strides;
    MemorySample sample;

    explicit Source(const at::Tensor& tensor)
        : storage(tensor.storage().getWeakStorageImpl()),
          version(tensor._version()),
          type(tensor.scalar_type()),
          sizes(tensor.sizes().vec()),
          strides(tensor.strides().vec()),
          sample(tensor) {}

    bool is(const at::Tensor& tensor) const {
      // another tensor can lie where one was that is gone, or beside it on memory that both only borrow
      const bool is_same = storage._unsafe_get_target() == tensor.storage().unsafeGetStorageImpl();
      return is_same && !storage.expired() && version == tensor._version() && tensor.scalar_type() == type &&
          tensor.sizes() == sizes && tensor.strides() == strides && sample.is_of(tensor);
    }
  };
  struct Entry {
    Source weight;
    std::optional<Source> scale;
    at::Tensor packed;

    bool is_of(const at::Tensor& other, const std::optional<at::Tensor>& factors) const {
      return weight.is(other) && scale.has_value() == factors.has_value() && (!scale || scale->is(*factors));
    }
  };
  std::mutex mutex_;
  std::map<Key, Entry> entries_;
};

inline PackedWeights& packed_weights() {
  static PackedWeights& packed = *new PackedWeights; // lives to the end: tensors must not outlive their allocator
  return packed;
}

// Whether ATen's brgemm multiplies `depth` interleaved numbers of these types on this machine, by trying.
template <typename A, typename B, typename C, int depth>
bool brgemm_works() {
  static const bool works = [] {
    A a[depth];
    B b[16 * depth];
    C c[16];
    for (int k = 0; k < depth; ++k) a[k] = static_cast<A>(k % 2 == 0 ? 3.f : 200.f);
    for (int i = 0; i < 16 * depth; ++i) b[i] = static_cast<B>(i - 32.f);
    try {
      at::native::cpublas::brgemm(1, 16, depth, depth, 16, 16, /*add_C=*/false, a, b, c);
    } catch (const std::exception&) { // of ATen or of oneDNN
      return false;
    }
    at::native::cpublas::brgemm_release();
    for (int i = 0; i < 16; ++i) {
      float sum = 0.f;
      for (int k = 0; k < depth; ++k) sum += (k % 2 == 0 ? 3.f : 200.f) * (i * depth + k - 32.f);
      if (static_cast<float>(c[i]) != sum) return false;
    }
    return true;
  }();
  return works;
}

inline bool has_float_brgemm() {
  return brgemm_works<float, float, float, 1>();
}

inline bool has_brgemm() {
  return brgemm_works<at::BFloat16, at::BFloat16, float, 2>();
}

inline bool has_int8_brgemm() {
#if defined(CPU_CAPABILITY_AVX2)
  return false; // products are this package's, on panels of their width
#else
  return brgemm_works<uint8_t, int8_t, int32_t, 4>();
#endif
}

} // namespace d2dmoe
