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
  const auto deal = [&](int64_t blocks, int64_t groups) {
    plan.blocks = blocks, plan.block = (tokens + blocks - 1) / blocks, plan.groups = groups;
    plan.bounds.assign(groups + 1, experts);
    plan.bounds[0] = 0;
  };
  const auto deal_tokens = [&] {
    const int64_t share = (tokens + threads - 1) / threads;
    deal(threads * ((share + max_block - 1) / max_block), 1);
  };
  if (threads == 1 || tokens >= threads * min_block) {
    deal_tokens();
    return plan;
  }
  constexpr int64_t kLoading = 4; // what loading an expert's weights costs, in tokens
  std::vector<int64_t> cost(experts + 1, 0); // of all experts before this one
  int64_t most = 0;
  for (int64_t e = 0; e < experts; ++e) {
    int64_t count = 0;
    for (int64_t t = 0; t < tokens; ++t) count += mask[t * experts + e];
    const int64_t own = count > 0 ? count + kLoading : 0;
    cost[e + 1] = cost[e] + own, most = std::max(most, own);
  }
  const int64_t blocks = std::max<int64_t>(1, tokens / min_block);
  if (2 * most * threads > 3 * cost[experts] * blocks) { // the others would wait for the thread with that expert
    deal_tokens();
    return plan;
  }
  deal(blocks, std::min(experts, (threads + blocks - 1) / blocks));
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
