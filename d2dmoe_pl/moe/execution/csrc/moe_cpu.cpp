// The operators d2dmoe_pl::moe_cpu, which runs, for every token, the experts that a mask selects; d2dmoe_pl::moe_layer_cpu,
// which lets a router and a gate select them, and leaves padding out; and those of what is around a layer.

#include "attention_operator.h"
#include "few_tokens.h"
#include "int8_linear_operator.h"
#include "int8_self_attention.h"
#include "operands.h"
#include "plan.h"
#include "problem.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

namespace d2dmoe {
namespace {

// out (tokens, d_out) = sum over groups of partial (groups, tokens, d_out)
template <typename T>
void sum_groups(const float* partial, int64_t groups, int64_t size, T* out) {
  at::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = partial[i];
      for (int64_t g = 1; g < groups; ++g) sum += partial[g * size + i];
      out[i] = sum;
    }
  });
}

template <typename Experts, typename T>
void execute(const Problem& problem, const Experts& experts, T* out) {
  const int64_t d = problem.outputs;
  const Plan plan = make_plan(
      problem.mask, problem.tokens, problem.experts, at::get_num_threads(), Experts::kMinBlock, Experts::kMaxBlock);
  const bool in_place = std::is_same_v<T, float> && plan.groups == 1;
  const at::Tensor partial = plan.groups == 1 ? at::Tensor() : at::empty({plan.groups, problem.tokens, d}, at::kFloat);
  at::parallel_for(0, plan.blocks * plan.groups, 1, [&](int64_t begin, int64_t end) {
    Experts own = experts; // with its work space
    Buckets buckets;
    std::vector<float> block;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task % plan.groups, first = task / plan.groups * plan.block;
      const int64_t tokens = std::min(plan.block, problem.tokens - first);
      if (tokens <= 0) break;
      float* y; // (tokens, d_out)
      if (plan.groups > 1) {
        y = partial.mutable_data_ptr<float>() + (group * problem.tokens + first) * d;
      } else if constexpr (std::is_same_v<T, float>) {
        y = out + first * d;
      } else {
        block.resize(tokens * d);
        y = block.data();
      }
      const int64_t begin_expert = plan.bounds[group], end_expert = plan.bounds[group + 1];
      buckets.fill(
          problem.mask + first * problem.experts + begin_expert, tokens, end_expert - begin_expert, problem.experts);
      const float* start = group == 0 ? problem.down_bias : nullptr;
      own.run(Block{first, tokens, begin_expert, end_expert, buckets}, start, y);
      if (plan.groups == 1 && !in_place) at::vec::convert(y, out + first * d, tokens * d);
    }
  });
  if (plan.groups > 1) sum_groups(partial.const_data_ptr<float>(), plan.groups, problem.tokens * d, out);
}

// What experts give for tokens by a mask (N, E): (N, d_out) in `dtype`.
at::Tensor run_experts(
    const Operands& operands, const Inputs& inputs, const at::Tensor& mask, Cutoffs cutoffs, at::ScalarType dtype) {
  const Problem problem = operands.problem(mask.size(0), mask.const_data_ptr<bool>(), cutoffs);
  const at::Tensor out = at::empty({problem.tokens, problem.outputs}, dtype);
  if (problem.tokens == 0) return out;
  if (operands.prefers_dense(problem, inputs)) return operands.dense(problem, inputs).to(dtype);
  operands.with_experts(problem, inputs, [&](const auto& experts) {
    if (dtype == at::kBFloat16) {
      execute(problem, experts, out.mutable_data_ptr<at::BFloat16>());
    } else {
      execute(problem, experts, out.mutable_data_ptr<float>());
    }
  });
  return out;
}

at::Tensor moe_cpu(
    const at::Tensor& tokens, const at::Tensor& mask, const Optionals& weights, const std::string& activation,
    const Optional& cutoff, const Optional& gate_cutoff) {
  const Operands operands(tokens, weights, activation);
  TORCH_CHECK_VALUE(!cutoff || cutoff->numel() == 1, "cutoff must be one number");
  TORCH_CHECK_VALUE(!gate_cutoff || gate_cutoff->numel() == 1, "gate_cutoff must be one number");
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kBool, "mask is ", mask.scalar_type(), ", not bool");
  const bool fits = mask.dim() == 2 && mask.size(0) == tokens.size(0) && mask.size(1) == operands.experts();
  TORCH_CHECK_VALUE(fits, "mask must be (N, E)");
  const auto number = [](const Optional& value) { return value ? value->item<float>() : 0.f; };
  const Cutoffs cutoffs{number(cutoff), number(gate_cutoff)};
  return run_experts(operands, operands.inputs(tokens), mask.contiguous(), cutoffs, tokens.scalar_type());
}

// The rows that are no padding, by plain copies: tensors' own operations take longer than a small layer.
class RealRows {
 public:
  RealRows(const Optional& real, int64_t positions) : positions_(positions), all_(true) {
    if (!real) return;
    const bool fits = real->scalar_type() == at::kBool && real->sizes() == at::IntArrayRef{positions};
    TORCH_CHECK_VALUE(fits, "real must be boolean (P,)");
    const at::Tensor dense = real->contiguous();
    const bool* is_real = dense.const_data_ptr<bool>();
    for (int64_t p = 0; p < positions; ++p) {
      if (is_real[p]) rows_.push_back(p);
    }
    all_ = static_cast<int64_t>(rows_.size()) == positions;
  }

  // (P, d) to (N, d)
  at::Tensor picked(const at::Tensor& positions) const {
    if (all_) return positions;
    const at::Tensor from = positions.contiguous();
    const at::Tensor to = at::empty({static_cast<int64_t>(rows_.size()), from.size(1)}, from.options());
    const int64_t bytes = from.size(1) * from.element_size();
    const auto* in = static_cast<const char*>(from.const_data_ptr());
    auto* out = static_cast<char*>(to.mutable_data_ptr());
    for (size_t i = 0; i < rows_.size(); ++i) std::memcpy(out + i * bytes, in + rows_[i] * bytes, bytes);
    return to;
  }

  // (N, d) to (P, d), zeros elsewhere
  at::Tensor placed(const at::Tensor& rows) const {
    if (all_) return rows;
    const at::Tensor to = at::zeros({positions_, rows.size(1)}, rows.options());
    const int64_t bytes = rows.size(1) * rows.element_size();
    const auto* in = static_cast<const char*>(rows.const_data_ptr());
    auto* out = static_cast<char*>(to.mutable_data_ptr());
    for (size_t i = 0; i < rows_.size(); ++i) std::memcpy(out + rows_[i] * bytes, in + i * bytes, bytes);
    return to;
  }

 private:
  int64_t positions_;
  bool all_;
  std::vector<int64_t> rows_;
};

// Adds to `out` (N, d_out) what stands in for the experts that tokens x (N, d) skip: share (up (down x) + mean).
// `skipped` (N, 1) is that share; `down` (R, d); `up` (R + 1, d_out), whose last row is the mean.
void add_stand_in(
    const at::Tensor& out, const at::Tensor& x, const at::Tensor& skipped, const at::Tensor& down,
    const at::Tensor& up) {
  const int64_t rank = down.size(0);
  TORCH_CHECK_VALUE(down.sizes() == at::IntArrayRef({rank, x.size(1)}), "the stand-in's down must be (R, d)");
  TORCH_CHECK_VALUE(up.sizes() == at::IntArrayRef({rank + 1, out.size(1)}), "the stand-in's up must be (R + 1, d_out)");
  const float* share = skipped.const_data_ptr<float>();
  if (std::all_of(share, share + skipped.numel(), [](float each) { return each == 0.f; })) return;
  const auto type = x.scalar_type();
  if (x.size(0) <= kFewTokens && down.scalar_type() == type && up.scalar_type() == type) {
    const auto add = [&]<typename T>(T* y) {
      const at::Tensor first = down.contiguous(), second = up.contiguous(), rows = x.contiguous();
      add_stand_in_rows(
          rows.const_data_ptr<T>(), x.size(0), x.size(1), share, first.const_data_ptr<T>(), rank,
          second.const_data_ptr<T>(), out.size(1), y);
    };
    if (type == at::kBFloat16) return add(out.mutable_data_ptr<at::BFloat16>());
    if (type == at::kFloat) return add(out.mutable_data_ptr<float>());
  }
  const at::Tensor shares = skipped.to(x.scalar_type());
  out.addmm_(at::cat({at::linear(x, down).mul_(shares), shares}, 1), up);
}

// What of tokens' values, of activations, and perhaps of gates, is too small to be multiplied with, at the setting of
// the layer's gate: nothing at the dense layer, `values` in full up to `full_tau`; of two rows the first lies halfway.
std::array<float, 3> cutoffs_at(double tau, int64_t k, int64_t experts, const Optional& values, double full_tau) {
  if (!values) return {};
  const int64_t rows = values->dim() == 2 ? values->size(0) : 1, number = values->size(-1);
  TORCH_CHECK_VALUE(number == 2 || number == 3, "cutoffs must be two numbers, or three");
  TORCH_CHECK_VALUE(values->dim() <= 2 && (rows == 1 || rows == 2), "cutoffs must be one row, or two");
  const double strength = k > 0 ? double(k < experts) : std::min(1.0, (1.0 - tau) / (1.0 - full_tau));
  const at::Tensor plain = values->to(at::kFloat).contiguous();
  const float* first = plain.const_data_ptr<float>();
  const float near = float(std::min(1.0, rows * strength)), far = float(std::max(0.0, 2.0 * strength - 1.0));
  std::array<float, 3> found = {};
  for (int64_t i = 0; i < number; ++i) {
    found[i] = first[i] * near + (rows == 2 ? (first[number + i] - first[i]) * far : 0.f);
  }
  return found;
}

// x with zeros in the place of what is smaller than `cutoff`, which is rounded to the type of x; NaN stays.
at::Tensor cut(const at::Tensor& x, float cutoff) {
  const at::Tensor from = x.contiguous(), to = at::empty_like(from);
  const auto copy = [&]<typename T>(const T* in) {
    T* out = to.mutable_data_ptr<T>();
    const float least = static_cast<float>(static_cast<T>(cutoff));
    for (int64_t i = 0; i < from.numel(); ++i) out[i] = std::abs(static_cast<float>(in[i])) < least ? T(0.f) : in[i];
  };
  if (from.scalar_type() == at::kBFloat16) {
    copy(from.const_data_ptr<at::BFloat16>());
  } else {
    copy(from.const_data_ptr<float>());
  }
  return to;
}

at::Tensor moe_layer_cpu(
    const at::Tensor& x, const Optional& real, const Optionals& router, const std::string& rule,
    const at::Tensor& tau, int64_t k, const std::optional<std::vector<at::Tensor>>& stand_in, const Optionals& weights,
    const std::string& activation, const Optional& cutoffs, double full_tau) {
  const at::AutoDispatchBelowADInplaceOrView below; // there are no gradients, and a view takes a microsecond to say so
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must be (..., d)");
  const at::Tensor positions = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); // (P, d)
  const Operands operands(positions, weights, activation);
  TORCH_CHECK_VALUE(tau.scalar_type() == at::kDouble && tau.numel() == 1, "tau must be one number in float64");
  const double setting = *tau.const_data_ptr<double>();
  const Gate gate(rule, cutoffs && setting > full_tau ? 1.0 : setting, k); // there, all that differs are the cutoffs
  TORCH_CHECK_VALUE(k <= operands.experts(), "k=", k, ": must be at most ", operands.experts(), ", the experts");
  const RealRows rows(real, positions.size(0));
  const at::Tensor tokens = rows.picked(positions); // (N, d)
  const Inputs inputs = operands.inputs(tokens);
  const at::Tensor mask = at::empty({tokens.size(0), operands.experts()}, at::kBool);
  TORCH_CHECK_VALUE(!stand_in || stand_in->size() == 2, "stand_in must be 2 tensors, or none");
  const bool is_chosen = !gate.admits_all(operands.experts()); // else there is nothing to score, nor to stand in for
  const bool stands_in = is_chosen && stand_in && tokens.size(0) > 0;
  const at::Tensor skipped = stands_in ? at::empty({tokens.size(0), 1}, at::kFloat) : at::Tensor();
  bool* chosen = mask.mutable_data_ptr<bool>();
  if (is_chosen) {
    operands.choose(inputs, router, gate, chosen, stands_in ? skipped.mutable_data_ptr<float>() : nullptr);
  } else {
    std::fill_n(chosen, mask.numel(), true);
  }
  const auto [of_inputs, of_hidden, of_gates] = cutoffs_at(setting, k, operands.experts(), cutoffs, full_tau);
  const Inputs kept = of_inputs > 0.f ? operands.inputs(cut(tokens, of_inputs)) : inputs;
  const at::Tensor out = run_experts(operands, kept, mask, {of_hidden, of_gates}, positions.scalar_type()); // (N, d_out)
  if (stands_in) add_stand_in(out, tokens, skipped, stand_in->front(), stand_in->back());
  const at::Tensor placed = rows.placed(out); // (P, d_out)
  if (x.dim() == 2) return placed;
  auto sizes = x.sizes().vec();
  sizes.back() = placed.size(1);
  return placed.view(sizes); // (..., d_out)
}

} // namespace

TORCH_LIBRARY_FRAGMENT(d2dmoe_pl, library) {
  library.def(
      "moe_cpu(Tensor tokens, Tensor mask, Tensor?[] weights, str activation, "
      "Tensor? cutoff=None, Tensor? gate_cutoff=None) -> Tensor");
  library.def(
      "moe_layer_cpu(Tensor x, Tensor? real, Tensor?[] router, str rule, Tensor tau, int k, "
      "Tensor[]? stand_in, Tensor?[] weights, str activation, Tensor? cutoffs=None, float full_tau=1.) -> Tensor");
  library.def("int8_linear_cpu(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");
  library.def("int8_linears_cpu(Tensor x, Tensor[] weights, Tensor[] scales, Tensor?[] biases) -> Tensor");
  library.def(
      "attention_cpu(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale, bool rounds=False) -> Tensor");
  library.def(
      "int8_self_attention_cpu(Tensor x, Tensor[] weights, Tensor[] scales, Tensor?[] biases, int heads, Tensor? mask, "
      "float? scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(d2dmoe_pl, CPU, library) {
  library.impl("moe_cpu", moe_cpu);
  library.impl("moe_layer_cpu", moe_layer_cpu);
  library.impl("int8_linear_cpu", int8_linear_cpu);
  library.impl("int8_linears_cpu", int8_linears_cpu);
  library.impl("attention_cpu", attention_cpu);
  library.impl("int8_self_attention_cpu", int8_self_attention_cpu);
}

} // namespace d2dmoe
