// The tensors that the operators are given, checked, and in the forms that products read.
#pragma once

#include "bfloat16_experts.h"
#include "few_tokens.h"
#include "float_experts.h"
#include "int8_experts.h"
#include "int8_masked_dense.h"
#include "masked_dense.h"
#include "packed.h"
#include "problem.h"
#include "router.h"

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <string>

namespace d2dmoe {

using Optional = std::optional<at::Tensor>;
using Optionals = c10::List<Optional>;

// Whether tokens are rounded to int8 for experts of so many neurons in int8. Without VNNI, a handful of tokens is not,
// whose time is that of reading weights; and experts so small that they are sums of few numbers take as long in fp32.
inline bool rounds_tokens(int64_t tokens, int64_t neurons) {
#if defined(D2DMOE_VNNI)
  return true;
#elif defined(D2DMOE_INT8)
  return tokens > kFewTokens && neurons >= 32;
#else
  return false;
#endif
}

inline const float* floats(const at::Tensor& values) {
  return values.defined() ? values.const_data_ptr<float>() : nullptr;
}

// A small tensor such as a bias or scales, in fp32; not defined where there is none.
inline at::Tensor in_fp32(const Optional& values) {
  if (!values) return at::Tensor();
  return values->scalar_type() == at::kFloat ? values->contiguous() : packed_weights().get(*values, Form::fp32);
}

// Tokens, in int8 too where products are.
struct Inputs {
  at::Tensor x; // (N, d)
  Int8Tokens int8;
};

class Operands {
 public:
  // weights: up (E, s, d), bias (E, s), gate, bias, down (E, s, d_out), bias (d_out,); where they are int8, also scales
  // of up (E, s), gate, and down (E, d_out).
  Operands(const at::Tensor& tokens, const Optionals& weights, const std::string& activation)
      : activation_(activation_named(activation)) {
    TORCH_CHECK_VALUE(weights.size() == 6 || weights.size() == 9, "weights must be 6 tensors, or 9 with scales");
    const auto given = [&](size_t i) { return i < weights.size() ? weights.get(i) : Optional(); };
    TORCH_CHECK_VALUE(given(0) && given(4), "up_weight and down_weight must be given");
    const at::Tensor up = *given(0), down = *given(4);
    const Optional gate = given(2);
    TORCH_CHECK_VALUE(tokens.dim() == 2 && up.dim() == 3, "tokens must be (N, d) and up_weight (E, s, d)");
    TORCH_CHECK_VALUE(tokens.size(0) <= INT32_MAX, "more tokens than a 32-bit number counts");
    is_int8_ = up.scalar_type() == at::kChar;
    TORCH_CHECK_VALUE(is_int8_ == (weights.size() == 9), "weights in int8, and no others, have scales");
    tokens_ = tokens.size(0), width_ = tokens.size(1);
    experts_ = up.size(0), neurons_ = up.size(1), outputs_ = down.size(-1);
    check("tokens", tokens, {tokens.size(0), width_}, false);
    check("up_weight", up, {experts_, neurons_, width_}, is_int8_);
    check("up_bias", given(1), {experts_, neurons_}, false);
    check("gate_weight", gate, {experts_, neurons_, width_}, is_int8_);
    check("gate_bias", given(3), {experts_, neurons_}, false);
    check("down_weight", down, {experts_, neurons_, outputs_}, is_int8_);
    check("down_bias", given(5), {outputs_}, false);
    weights_ = {up, given(1), gate, given(3), down, given(5)};
    up_bias_ = in_fp32(given(1)), gate_bias_ = in_fp32(given(3)), down_bias_ = in_fp32(given(5));
    if (is_int8_) {
      TORCH_CHECK_VALUE(given(6) && given(8) && bool(given(7)) == bool(gate), "weights in int8 must have scales");
      check("up_scale", given(6), {experts_, neurons_}, false);
      check("gate_scale", given(7), {experts_, neurons_}, false);
      check("down_scale", given(8), {experts_, outputs_}, false);
      up_scale_ = in_fp32(given(6)), gate_scale_ = in_fp32(given(7)), down_scale_ = in_fp32(given(8));
      type_ = at::kFloat;
      rounds_ = rounds_tokens(tokens.size(0), neurons_), reads_int8_ = !rounds_ && tokens.size(0) <= kFewTokens;
      prepare_int8(up, gate, down);
    } else {
      type_ = tokens.scalar_type() == at::kBFloat16 && has_brgemm() ? at::kBFloat16 : at::kFloat;
      const Form first = type_ == at::kFloat ? Form::fp32 : Form::transposed_pairs;
      up_ = in(up, first), down_ = in(down, type_ == at::kFloat ? Form::fp32 : Form::pairs);
      if (gate) gate_ = in(*gate, first);
    }
  }

  int64_t experts() const { return experts_; }

  // Tokens (N, d) in the type that products read.
  Inputs inputs(const at::Tensor& tokens) const {
    if (!rounds_) return {tokens.to(type_).contiguous(), {}};
    const at::Tensor x = tokens.contiguous();
    return {x, x.scalar_type() == at::kFloat ? quantised_tokens<float>(x) : quantised_tokens<at::BFloat16>(x)};
  }

  Problem problem(int64_t tokens, const bool* mask, Cutoffs cutoffs) const {
    return {tokens, experts_, neurons_, width_, outputs_, mask,
            floats(up_bias_), floats(gate_bias_), floats(down_bias_), activation_, cutoffs};
  }

  // Whether every expert is computed, and the mask laid over them, rather than each by itself.
  bool prefers_dense(const Problem& problem, const Inputs& inputs) const {
    if (problem.tokens == 0) return false;
    const bool is_gated = gate_.defined();
    if (may_join()) {
      const auto joins = [&] { return packed_weights().get(*weights_[4], Form::joins_well, down_scale_).item<bool>(); };
      return dense_is_faster(problem, is_gated, rounds_ ? kInInt8 : kInInt8OfFloats) && joins();
    }
    if (is_int8_) return is_in_float() && dense_is_faster(problem, is_gated, kInFloat);
    const auto type = inputs.x.scalar_type();
    if (type_ == at::kFloat) return dense_is_faster(problem, is_gated, kInFloat);
    const Costs& costs = problem.tokens <= kFewTokens ? kFewInBFloat16 : kInBFloat16;
    return are_of(type) && dense_is_faster(problem, is_gated, costs);
  }

  at::Tensor dense(const Problem& problem, const Inputs& inputs) const {
    const auto& w = weights_;
    if (may_join()) {
      const Int8Weights weights{*w[0], up_scale_, w[2], gate_scale_, *w[4], down_scale_};
      return int8_masked_dense(problem, inputs.x, weights);
    }
    if (is_in_float()) {
      const Optional gate = gate_.defined() ? Optional(gate_) : Optional();
      return masked_dense(problem, inputs.x, up_, w[1], gate, w[3], down_, w[5]);
    }
    return masked_dense(problem, inputs.x, *w[0], w[1], w[2], w[3], *w[4], w[5]);
  }

  // Call f with the experts of the type at hand.
  template <typename F>
  void with_experts(const Problem& problem, const Inputs& inputs, const F& f) const {
    const Optional gate = gate_.defined() ? Optional(gate_) : Optional();
#if defined(D2DMOE_INT8)
    if (rounds_) {
      const auto rows = [](const at::Tensor& w, const at::Tensor& scale, const at::Tensor& sums) {
        return Int8Up{w.const_data_ptr<int8_t>(), floats(scale), sums.const_data_ptr<int32_t>()};
      };
      return f(Int8Experts(
          problem, inputs.int8, rows(up_, up_scale_, up_sums_), gate ? rows(gate_, gate_scale_, gate_sums_) : Int8Up{},
          down_.const_data_ptr<int8_t>(), floats(down_scale_), down_sums_.const_data_ptr<int32_t>(),
          up_quads_.defined() ? up_quads_.const_data_ptr<int8_t>() : nullptr,
          gate_quads_.defined() ? gate_quads_.const_data_ptr<int8_t>() : nullptr));
    }
#endif
    if (reads_int8_) {
      const auto of = [](const at::Tensor& w) { return w.defined() ? w.const_data_ptr<int8_t>() : nullptr; };
      const FewTokensWeights<int8_t> weights{
          of(up_), of(gate_), of(down_), floats(up_scale_), floats(gate_scale_), floats(down_scale_)};
      return f(FewTokensExperts<int8_t>(problem, inputs.x, weights));
    }
    if (type_ == at::kBFloat16) {
      if (problem.tokens <= kFewTokens && are_of(type_)) {
        const at::Tensor up = weights_[0]->contiguous(), down = weights_[4]->contiguous();
        const Optional rows = gate ? Optional(weights_[2]->contiguous()) : Optional();
        const auto of = [](const Optional& w) { return w ? w->const_data_ptr<at::BFloat16>() : nullptr; };
        const FewTokensWeights<at::BFloat16> weights{of(up), of(rows), of(down), nullptr, nullptr, nullptr};
        return f(FewTokensExperts<at::BFloat16>(problem, inputs.x, weights));
      }
      return f(BFloat16Experts(problem, inputs.x, up_, gate, down_));
    }
    f(FloatExperts(problem, inputs.x, up_, gate, down_));
  }

  // mask (N, E): what `gate` admits by the scores of a router, whose weights are up (R, d), bias (R,), down (E, R),
  // bias (E,); where they are int8, also scales of up (R,) and down (E,).
  void choose(const Inputs& inputs, const Optionals& router, const Gate& gate, bool* mask, float* skipped) const {
    TORCH_CHECK_VALUE(router.size() == 4 || router.size() == 6, "router must be 4 tensors, or 6 with scales");
    const auto given = [&](size_t i) { return i < router.size() ? router.get(i) : Optional(); };
    TORCH_CHECK_VALUE(given(0) && given(2), "the router's weights must be given");
    const at::Tensor up = *given(0), down = *given(2);
    const bool is_int8 = router.size() == 6;
    TORCH_CHECK_VALUE(is_int8 == is_int8_, "router and experts must both be int8, or neither");
    const int64_t hidden = up.size(0);
    check("router up_weight", up, {hidden, width_}, is_int8);
    check("router up_bias", given(1), {hidden}, false);
    check("router down_weight", down, {experts_, hidden}, is_int8);
    check("router down_bias", given(3), {experts_}, false);
    check("router up_scale", given(4), {hidden}, false);
    check("router down_scale", given(5), {experts_}, false);
    const at::Tensor b1 = in_fp32(given(1)), b2 = in_fp32(given(3));
    const RouterProblem problem{width_, hidden, experts_, floats(b1), floats(b2)};
    const int64_t tokens = inputs.x.size(0);
    if (is_int8) {
      TORCH_CHECK_VALUE(given(4) && given(5), "a router in int8 must have scales");
      const at::Tensor s1 = in_fp32(given(4)), s2 = in_fp32(given(5));
#if defined(D2DMOE_INT8)
      if (rounds_) {
        const at::Tensor u = up.contiguous(), v = down.contiguous();
        const at::Tensor t1 = packed_weights().get(u, Form::row_sums), t2 = packed_weights().get(v, Form::row_sums);
        const Int8Up first{u.const_data_ptr<int8_t>(), floats(s1), t1.const_data_ptr<int32_t>()};
        const Int8Up second{v.const_data_ptr<int8_t>(), floats(s2), t2.const_data_ptr<int32_t>()};
        const at::Tensor p1 = has_int8_brgemm() ? packed_weights().get(u, Form::panels) : at::Tensor();
        const at::Tensor p2 = has_int8_brgemm() ? packed_weights().get(v, Form::panels) : at::Tensor();
        const auto panels = [](const at::Tensor& w) { return w.defined() ? w.const_data_ptr<int8_t>() : nullptr; };
        const Int8Router scorer(problem, inputs.int8, first, second, panels(p1), panels(p2));
        const auto* values = inputs.int8.values.const_data_ptr<uint8_t>();
        return choose_experts(scorer, problem, gate, values, tokens, mask, skipped);
      }
#endif
      if (reads_int8_) {
        const at::Tensor w1 = up.contiguous(), w2 = down.contiguous();
        const FewTokensRouter<float, int8_t> scorer(
            problem, w1.const_data_ptr<int8_t>(), floats(s1), w2.const_data_ptr<int8_t>(), floats(s2));
        return choose_experts(scorer, problem, gate, inputs.x.const_data_ptr<float>(), tokens, mask, skipped);
      }
      const at::Tensor w1 = packed_weights().get(up, Form::dequantised_rows, s1);
      const at::Tensor w2 = packed_weights().get(down, Form::dequantised_rows, s2);
      const FloatRouter scorer(problem, floats(w1), floats(w2));
      return choose_experts(scorer, problem, gate, inputs.x.const_data_ptr<float>(), tokens, mask, skipped);
    }
    if (type_ == at::kBFloat16 && tokens <= kFewTokens && up.scalar_type() == type_ && down.scalar_type() == type_) {
      const at::Tensor w1 = up.contiguous(), w2 = down.contiguous();
      const FewTokensRouter<at::BFloat16, at::BFloat16> scorer(
          problem, w1.const_data_ptr<at::BFloat16>(), nullptr, w2.const_data_ptr<at::BFloat16>(), nullptr);
      return choose_experts(scorer, problem, gate, inputs.x.const_data_ptr<at::BFloat16>(), tokens, mask, skipped);
    }
    if (type_ == at::kBFloat16) {
      const at::Tensor w1 = in(up, Form::transposed_pairs);
      const at::Tensor w2 = in(down, Form::transposed_pairs);
      const BFloat16Router scorer(
          problem, w1.const_data_ptr<at::BFloat16>(), w2.const_data_ptr<at::BFloat16>());
      return choose_experts(scorer, problem, gate, inputs.x.const_data_ptr<at::BFloat16>(), tokens, mask, skipped);
    }
    const at::Tensor w1 = in(up, Form::fp32), w2 = in(down, Form::fp32);
    const FloatRouter scorer(problem, floats(w1), floats(w2));
    choose_experts(scorer, problem, gate, inputs.x.const_data_ptr<float>(), tokens, mask, skipped);
  }

 private:
  // Whether `up_`, `gate_` and `down_` are in fp32, whatever the weights that were given are in.
  bool is_in_float() const { return type_ == at::kFloat && !rounds_ && !reads_int8_; }

  // Whether all experts in int8 can be multiplied at once, in int8.
  bool may_join() const {
    return is_int8_ && PanelProducts::are_there(tokens_) && experts_ * neurons_ <= kDeepest && width_ > 0 && outputs_ > 0;
  }

  // Whether the weights as they were given are all of `type`.
  bool are_of(at::ScalarType type) const {
    const auto is_of = [&](const Optional& w) { return !w || w->scalar_type() == type; };
    return !is_int8_ && is_of(weights_[0]) && is_of(weights_[2]) && is_of(weights_[4]);
  }

  void prepare_int8(const at::Tensor& up, const Optional& gate, const at::Tensor& down) {
    auto& packed = packed_weights();
    if (reads_int8_) {
      up_ = up.contiguous(), down_ = down.contiguous();
      if (gate) gate_ = gate->contiguous();
      return;
    }
    if (!rounds_) {
      up_ = packed.get(up, Form::dequantised_rows, up_scale_);
      if (gate) gate_ = packed.get(*gate, Form::dequantised_rows, gate_scale_);
      down_ = packed.get(down, Form::dequantised_columns, down_scale_);
      return;
    }
    up_ = up.contiguous(), up_sums_ = packed.get(up, Form::row_sums);
    if (gate) gate_ = gate->contiguous(), gate_sums_ = packed.get(*gate, Form::row_sums);
    down_ = packed.get(down, Form::quads), down_sums_ = packed.get(down, Form::chunk_sums);
#if defined(D2DMOE_VNNI)
    if (!has_int8_brgemm()) return;
#endif
    up_quads_ = packed.get(up, Form::transposed_quads);
    if (gate) gate_quads_ = packed.get(*gate, Form::transposed_quads);
  }

  static at::Tensor in(const at::Tensor& w, Form form) {
    return form == Form::fp32 && w.scalar_type() == at::kFloat ? w.contiguous() : packed_weights().get(w, form);
  }

  static void check(const char* name, const Optional& tensor, at::IntArrayRef shape, bool is_int8) {
    if (!tensor) return;
    const auto type = tensor->scalar_type();
    TORCH_CHECK_VALUE(tensor->sizes() == shape, name, " has shape ", tensor->sizes(), ", not ", shape);
    const bool fits = is_int8 ? type == at::kChar : type == at::kFloat || type == at::kBFloat16;
    TORCH_CHECK_VALUE(fits, name, " is ", type, ", not ", is_int8 ? "int8" : "float32 or bfloat16");
  }

  Activation activation_;
  bool is_int8_;
  bool rounds_ = false; // tokens, to int8
  bool reads_int8_ = false; // a handful of tokens, which are not rounded, on the numbers as they are
  at::ScalarType type_; // of products, but for those in int8
  int64_t tokens_, experts_, neurons_, width_, outputs_;
  std::array<Optional, 6> weights_; // as they were given
  at::Tensor up_, gate_, down_, up_bias_, gate_bias_, down_bias_;
  at::Tensor up_scale_, gate_scale_, down_scale_, up_sums_, gate_sums_, down_sums_, up_quads_, gate_quads_; // of int8
};

} // namespace d2dmoe
