// Who does what: blocks of tokens, and where tokens are few, ranges of experts; and which tokens chose which expert.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace d2dmoe {

// The work, cut into `blocks * groups` tasks: a block of tokens times a range of experts.
struct Plan {
  int64_t blocks; // of tokens
  int64_t block;  // tokens in each but the last
  int64_t groups; // of experts; each has an output of its own, to be summed, if there are several
  std::vector<int64_t> bounds; // of the groups: experts [bounds[g], bounds[g + 1])
};

// Threads take ranges of tokens. A thread with few tokens would load all weights for little work, so that below
// `min_block` tokens a thread, experts are dealt out as well, in ranges of about equal cost.
inline Plan make_plan(
    const bool* mask, int64_t tokens, int64_t experts, int64_t threads, int64_t min_block, int64_t max_block) {
  Plan plan;
  if (tokens >= threads * min_block) {
    const int64_t share = (tokens + threads - 1) / threads;
    plan.blocks = threads * ((share + max_block - 1) / max_block);
    plan.groups = 1;
  } else {
    plan.blocks = std::max<int64_t>(1, tokens / min_block);
    plan.groups = std::min(experts, (threads + plan.blocks - 1) / plan.blocks);
  }
  plan.block = (tokens + plan.blocks - 1) / plan.blocks;
  plan.bounds.assign(plan.groups + 1, experts);
  plan.bounds[0] = 0;
  if (plan.groups == 1) return plan;
  constexpr int64_t kLoading = 4; // what loading an expert's weights costs, in tokens
  std::vector<int64_t> cost(experts + 1, 0); // of all experts before this one
  for (int64_t e = 0; e < experts; ++e) {
    int64_t count = 0;
    for (int64_t t = 0; t < tokens; ++t) count += mask[t * experts + e];
    cost[e + 1] = cost[e] + (count > 0 ? count + kLoading : 0);
  }
  for (int64_t g = 1; g < plan.groups; ++g) {
    const int64_t target = cost[experts] * g / plan.groups;
    plan.bounds[g] = std::lower_bound(cost.begin(), cost.end(), target) - cost.begin();
  }
  return plan;
}

// For each of some experts, the numbers of the tokens that chose it, ascending.
class Buckets {
 public:
  // mask: (tokens, experts) with rows `stride` apart.
  void fill(const bool* mask, int64_t tokens, int64_t experts, int64_t stride) {
    ld_ = tokens + 16; // 16: neighbouring experts' lists do not fall on the same cache sets
    rows_.resize(experts * ld_);
    counts_.assign(experts, 0);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t e = 0; e < experts; ++e) { // no branch to mispredict: write always, advance if chosen
        rows_[e * ld_ + counts_[e]] = static_cast<int32_t>(t);
        counts_[e] += mask[t * stride + e];
      }
    }
  }
  const int32_t* rows(int64_t expert) const { return rows_.data() + expert * ld_; }
  int64_t count(int64_t expert) const { return counts_[expert]; }

 private:
  int64_t ld_ = 0;
  std::vector<int32_t> rows_;
  std::vector<int32_t> counts_;
};

// One task: some tokens, and those of a range of experts that they chose.
struct Block {
  int64_t first, tokens;
  int64_t begin, end; // experts
  const Buckets& buckets; // of the range

  const int32_t* rows(int64_t expert) const { return buckets.rows(expert - begin); }
  int64_t count(int64_t expert) const { return buckets.count(expert - begin); }

  // Runs the experts that any token chose.
  template <typename Run>
  void each(const Run& run) const {
    for (int64_t expert = begin; expert < end; ++expert) {
      if (count(expert) > 0) run(expert);
    }
  }
};

} // namespace d2dmoe
