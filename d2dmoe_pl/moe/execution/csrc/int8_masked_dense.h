// All experts in int8 at once, as the two linear layers of a dense FFN, with zeros for what a mask leaves out.
#pragma once

#include "int8_linear.h"
#include "masked_dense.h"
#include "packed.h"
#include "problem.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace d2dmoe {

constexpr int64_t kJoined = kHasMatrixUnit ? 128 : 64; // tokens, whose activations stay in the cache
constexpr int64_t kDeepest = 133'000; // neurons, of which sums of 127 * 127 stay below 2 ** 31

// Of experts: up and gate (E, s, d), if there is one, with scales (E, s); down (E, s, d_out), with scales (E, d_out).
struct Int8Weights {
  at::Tensor up, up_scale;
  std::optional<at::Tensor> gate;
  at::Tensor gate_scale, down, down_scale;
};

// x (N, d) to (N, d_out), by the layers that give activations (N, E * s), and gates, and outputs from these.
template <typename T>
at::Tensor int8_masked_dense(
    const Problem& problem, const at::Tensor& x, std::vector<Int8Linear<float>> first, Int8Linear<T> second) {
  const int64_t some = std::min<int64_t>(problem.tokens, kJoined * at::get_num_threads());
  const int64_t size = problem.experts * problem.neurons;
  const at::Tensor hidden = at::empty({static_cast<int64_t>(first.size()), some, size}, at::kFloat);
  float* rows = hidden.mutable_data_ptr<float>();
  for (size_t i = 0; i < first.size(); ++i) first[i].out = rows + i * some * size;
  const float* gates = first.size() > 1 ? first[1].out : nullptr;
  const at::Tensor out = at::empty({problem.tokens, problem.outputs}, x.options());
  for (int64_t t = 0; t < problem.tokens; t += some) {
    const int64_t count = std::min(some, problem.tokens - t);
    int8_linears(x.const_data_ptr<T>() + t * problem.width, count, problem.width, first, size);
    activate_masked(problem, problem.mask + t * problem.experts, count, gates, rows);
    second.out = out.mutable_data_ptr<T>() + t * problem.outputs;
    int8_linears(rows, count, size, std::vector{second}, problem.outputs);
  }
  return out;
}

// Tokens are rounded with a scale each, and so are a token's activations, by all experts together. The outputs of each
// expert have scales of their own, instead of which there are some for all.
inline at::Tensor int8_masked_dense(
    const Problem& problem, const at::Tensor& x, const Int8Weights& weights) {
  PackedWeights& packed = packed_weights();
  const int64_t size = problem.experts * problem.neurons;
  std::vector<at::Tensor> kept; // what is read below
  const auto rows = [&](const at::Tensor& weight, const at::Tensor& scale, const float* bias) {
    const at::Tensor w = packed.get(weight, Form::panels), sums = packed.get(weight, Form::row_sums);
    kept.insert(kept.end(), {w, sums});
    return Int8Linear<float>{
        w.const_data_ptr<int8_t>(), scale.const_data_ptr<float>(), sums.const_data_ptr<int32_t>(), bias, size, nullptr};
  };
  std::vector<Int8Linear<float>> first = {rows(weights.up, weights.up_scale, problem.up_bias)};
  if (weights.gate) first.push_back(rows(*weights.gate, weights.gate_scale, problem.gate_bias));
  const auto columns = [&](Form form) { return packed.get(weights.down, form, weights.down_scale); };
  const at::Tensor down = columns(Form::joined_panels), scale = columns(Form::joined_scale);
  const at::Tensor sums = columns(Form::joined_sums);
  const auto run = [&]<typename T>(T* none) {
    const Int8Linear<T> second{
        down.const_data_ptr<int8_t>(), scale.const_data_ptr<float>(), sums.const_data_ptr<int32_t>(), problem.down_bias,
        problem.outputs, none};
    return int8_masked_dense(problem, x, first, second);
  };
  return x.scalar_type() == at::kBFloat16 ? run(static_cast<at::BFloat16*>(nullptr)) : run(static_cast<float*>(nullptr));
}

} // namespace d2dmoe
