// The operators for linear layers in int8: their tensors, checked, and in the forms that products read.
#pragma once

#include "int8_linear.h"
#include "operands.h"
#include "packed.h"

#include <ATen/ATen.h>

#include <utility>
#include <vector>

namespace d2dmoe {

inline void check_linear(int64_t depth, const at::Tensor& weight, const at::Tensor& scale, const Optional& bias) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.scalar_type() == at::kChar, "weight must be int8 (N, K)");
  TORCH_CHECK_VALUE(depth == weight.size(1), "x is ", depth, " wide, not ", weight.size(1));
  const int64_t columns = weight.size(0);
  TORCH_CHECK_VALUE(scale.sizes() == at::IntArrayRef{columns}, "scale has shape ", scale.sizes(), ", not ", columns);
  TORCH_CHECK_VALUE(!bias || bias->sizes() == at::IntArrayRef{columns}, "bias must be (N,)");
}

// What linear layers in int8 give for x (M, K), side by side: (M, sum of N), given each one's weight, scale and bias.
inline at::Tensor int8_linears_cpu(
    const at::Tensor& x, at::TensorList weights, at::TensorList scales, const Optionals& biases) {
  const bool in_bf16 = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK_VALUE(in_bf16 || x.scalar_type() == at::kFloat, "x is ", x.scalar_type(), ", not float32 or bfloat16");
  TORCH_CHECK_VALUE(x.dim() == 2, "x has shape ", x.sizes(), ", not (M, K)");
  TORCH_CHECK_VALUE(scales.size() == weights.size() && biases.size() == weights.size(), "one scale and bias a weight");
  int64_t apart = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_linear(x.size(1), weights[i], scales[i], biases[i]);
    apart += weights[i].size(0);
  }
  const at::Tensor rows = x.contiguous(), out = at::empty({rows.size(0), apart}, x.options());
  std::vector<at::Tensor> kept; // what is read below
  const auto collect = [&]<typename T>(std::vector<Int8Linear<T>> linears) {
    int64_t first = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const at::Tensor &weight = weights[i], &scale = scales[i];
      const int64_t columns = weight.size(0);
      const Optional& bias = biases[i];
      const at::Tensor factors = in_fp32(scale), added = in_fp32(bias);
      const int64_t place = std::exchange(first, first + columns);
      T* to = out.mutable_data_ptr<T>() + place;
      if (!PanelProducts::are_there(rows.size(0)) && rows.size(0) <= kFewTokens) {
        const at::Tensor numbers = weight.contiguous();
        few_rows_linear(
            rows.const_data_ptr<T>(), rows.size(0), x.size(1), numbers.const_data_ptr<int8_t>(), floats(factors),
            floats(added), columns, to, apart);
        continue;
      }
      if (!PanelProducts::are_there(rows.size(0))) {
        const at::Tensor multiplied = packed_weights().get(weight, Form::dequantised_rows, factors);
        const Optional own_bias = bias ? Optional(added) : Optional();
        out.narrow(1, place, columns).copy_(at::linear(rows.to(at::kFloat), multiplied, own_bias));
        continue;
      }
      const at::Tensor w = packed_weights().get(weight, Form::panels);
      const at::Tensor sums = packed_weights().get(weight, Form::row_sums);
      linears.push_back(
          {w.const_data_ptr<int8_t>(), floats(factors), sums.const_data_ptr<int32_t>(), floats(added), columns, to});
      kept.insert(kept.end(), {factors, added, w, sums});
    }
    if (rows.size(0) > 0 && !linears.empty()) {
      int8_linears(rows.const_data_ptr<T>(), rows.size(0), x.size(1), linears, apart);
    }
  };
  if (in_bf16) {
    collect(std::vector<Int8Linear<at::BFloat16>>());
  } else {
    collect(std::vector<Int8Linear<float>>());
  }
  return out;
}

inline at::Tensor int8_linear_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, const Optional& bias) {
  return int8_linears_cpu(x, weight, scale, {bias});
}

} // namespace d2dmoe
