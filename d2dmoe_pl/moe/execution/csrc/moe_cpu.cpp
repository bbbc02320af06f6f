// The operator d2dmoe_pl::moe_cpu: runs, for every token, the experts that a mask selects.

#include "bfloat16_experts.h"
#include "float_experts.h"
#include "plan.h"
#include "problem.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

namespace d2dmoe {
namespace {

constexpr int64_t kMinBlock = 32; // tokens a thread, below which experts are dealt out to threads as well

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

template <typename Experts, typename T = typename Experts::scalar>
void execute(const Problem& problem, Experts experts, const T* x, T* out) {
  const int64_t d = problem.outputs;
  const Plan plan = make_plan(
      problem.mask, problem.tokens, problem.experts, at::get_num_threads(), kMinBlock, Experts::kMaxBlock);
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
      for (int64_t t = 0; t < tokens; ++t) {
        if (group == 0 && problem.down_bias != nullptr) {
          std::copy_n(problem.down_bias, d, y + t * d);
        } else {
          std::fill_n(y + t * d, d, 0.f);
        }
      }
      const int64_t begin_expert = plan.bounds[group], end_expert = plan.bounds[group + 1];
      buckets.fill(
          problem.mask + first * problem.experts + begin_expert, tokens, end_expert - begin_expert, problem.experts);
      for (int64_t e = begin_expert; e < end_expert; ++e) {
        own.run(e, x + first * problem.width, buckets.rows(e - begin_expert), buckets.count(e - begin_expert), y);
      }
      if (plan.groups == 1 && !in_place) at::vec::convert(y, out + first * d, tokens * d);
    }
  });
  if (plan.groups > 1) sum_groups(partial.const_data_ptr<float>(), plan.groups, problem.tokens * d, out);
}

using Optional = std::optional<at::Tensor>;

void check_inputs(
    const at::Tensor& tokens, const at::Tensor& mask, const at::Tensor& up_weight, const Optional& up_bias,
    const Optional& gate_weight, const Optional& gate_bias, const at::Tensor& down_weight, const Optional& down_bias) {
  const auto is_float = [](const at::Tensor& t) {
    return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16;
  };
  const auto check = [&](const char* name, const Optional& tensor, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(!tensor || tensor->sizes() == shape, name, " has shape ", tensor->sizes(), ", not ", shape);
    TORCH_CHECK_VALUE(!tensor || is_float(*tensor), name, " is ", tensor->scalar_type(), ", not float32 or bfloat16");
  };
  TORCH_CHECK_VALUE(tokens.dim() == 2 && up_weight.dim() == 3, "tokens must be (N, d) and up_weight (E, s, d)");
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kBool, "mask is ", mask.scalar_type(), ", not bool");
  const int64_t experts = up_weight.size(0), neurons = up_weight.size(1), width = tokens.size(1);
  const bool fits = mask.dim() == 2 && mask.size(0) == tokens.size(0) && mask.size(1) == experts;
  TORCH_CHECK_VALUE(fits, "mask must be (N, E)");
  check("tokens", tokens, {tokens.size(0), width});
  check("up_weight", up_weight, {experts, neurons, width});
  check("up_bias", up_bias, {experts, neurons});
  check("gate_weight", gate_weight, {experts, neurons, width});
  check("gate_bias", gate_bias, {experts, neurons});
  check("down_weight", down_weight, {experts, neurons, down_weight.size(-1)});
  check("down_bias", down_bias, {down_weight.size(-1)});
  TORCH_CHECK_VALUE(tokens.size(0) <= INT32_MAX, "more tokens than a 32-bit number counts");
}

at::Tensor moe_cpu(
    const at::Tensor& tokens, const at::Tensor& mask, const at::Tensor& up_weight, const Optional& up_bias,
    const Optional& gate_weight, const Optional& gate_bias, const at::Tensor& down_weight, const Optional& down_bias,
    const std::string& activation) {
  check_inputs(tokens, mask, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias);
  static PackedWeights& packed = *new PackedWeights; // lives to the end: tensors must not outlive their allocator
  const bool in_bf16 = tokens.scalar_type() == at::kBFloat16 && has_brgemm();
  const auto weight = [&](const at::Tensor& w, Form form) {
    return form == Form::fp32 && w.scalar_type() == at::kFloat ? w.contiguous() : packed.get(w, form);
  };
  const Form first = in_bf16 ? Form::transposed_pairs : Form::fp32, second = in_bf16 ? Form::pairs : Form::fp32;
  const at::Tensor up = weight(up_weight, first), down = weight(down_weight, second);
  const Optional gate = gate_weight ? Optional(weight(*gate_weight, first)) : Optional();
  const auto bias = [&](const Optional& b) { return b ? weight(*b, Form::fp32) : at::Tensor(); };
  const auto data = [](const at::Tensor& b) { return b.defined() ? b.const_data_ptr<float>() : nullptr; };
  const at::Tensor b1 = bias(up_bias), bg = bias(gate_bias), b2 = bias(down_bias), chosen = mask.contiguous();
  const at::Tensor x = tokens.to(in_bf16 ? at::kBFloat16 : at::kFloat).contiguous();
  const Problem problem{
      x.size(0), up_weight.size(0), up_weight.size(1), x.size(1), down_weight.size(2), chosen.const_data_ptr<bool>(),
      data(b1), data(bg), data(b2), activation_named(activation)};
  at::Tensor out = at::empty({problem.tokens, problem.outputs}, x.options());
  if (problem.tokens == 0) return out.to(tokens.scalar_type());
  if (in_bf16) {
    const BFloat16Experts experts(problem, up, gate, down);
    execute(problem, experts, x.const_data_ptr<at::BFloat16>(), out.mutable_data_ptr<at::BFloat16>());
  } else {
    execute(problem, FloatExperts(problem, up, gate, down), x.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  }
  return out.to(tokens.scalar_type());
}

} // namespace

TORCH_LIBRARY_FRAGMENT(d2dmoe_pl, library) {
  library.def(
      "moe_cpu(Tensor tokens, Tensor mask, Tensor up_weight, Tensor? up_bias, Tensor? gate_weight, Tensor? gate_bias, "
      "Tensor down_weight, Tensor? down_bias, str activation) -> Tensor");
}

TORCH_LIBRARY_IMPL(d2dmoe_pl, CPU, library) {
  library.impl("moe_cpu", moe_cpu);
}

} // namespace d2dmoe
