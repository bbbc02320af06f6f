// bf16 weights in the order that matrix units read: pairs of rows interleaved ("VNNI"), packed once a change.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <mutex>
#include <unordered_map>
#include <vector>

namespace d2dmoe {

inline int64_t even(int64_t n) {
  return n + n % 2;
}

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

// How a copy of a weight (E, s, d) is kept.
enum class Form { fp32, pairs, transposed_pairs };

inline at::Tensor pack(const at::Tensor& weight, Form form) {
  if (form == Form::fp32) return weight.to(at::kFloat).contiguous();
  return interleave(weight.to(at::kBFloat16).contiguous(), form == Form::transposed_pairs);
}

// Packed copies by the weight they were made from, as long as it lives and is not written to.
class PackedWeights {
 public:
  at::Tensor get(const at::Tensor& weight, Form form) {
    if (weight.is_inference()) return pack(weight, form); // has no version to tell a change by
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = entries_.find(weight.const_data_ptr());
    if (found != entries_.end() && found->second.is_of(weight, form)) return found->second.packed;
    for (auto entry = entries_.begin(); entry != entries_.end();) { // those whose weight is gone
      entry = entry->second.storage.expired() ? entries_.erase(entry) : std::next(entry);
    }
    at::Tensor packed = pack(weight, form);
    entries_.insert_or_assign(
        weight.const_data_ptr(),
        Entry{weight.storage().getWeakStorageImpl(), weight._version(), weight.sizes().vec(), form, packed});
    return packed;
  }

 private:
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    int64_t version;
    std::vector<int64_t> sizes;
    Form form;
    at::Tensor packed;

    bool is_of(const at::Tensor& weight, Form wanted) const {
      return !storage.expired() && version == weight._version() && weight.sizes() == sizes && form == wanted;
    }
  };
  std::mutex mutex_;
  std::unordered_map<const void*, Entry> entries_;
};

// Whether ATen's brgemm multiplies bf16 pairs on this machine, by trying.
inline bool has_brgemm() {
  static const bool has = [] {
    const at::BFloat16 a[2] = {2.f, 3.f};
    at::BFloat16 b[32];
    float c[16];
    for (int i = 0; i < 32; ++i) b[i] = static_cast<float>(i);
    try {
      at::native::cpublas::brgemm(1, 16, 2, 2, 16, 16, /*add_C=*/false, a, b, c);
    } catch (const c10::Error&) {
      return false;
    }
    at::native::cpublas::brgemm_release();
    for (int i = 0; i < 16; ++i) {
      if (c[i] != 2.f * (2 * i) + 3.f * (2 * i + 1)) return false;
    }
    return true;
  }();
  return has;
}

} // namespace d2dmoe
