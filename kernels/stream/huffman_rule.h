// huffman_rule.h: the steps of a canonical Huffman code that the host and the GPU share, so that
// both make the same codes of the same counts.
#pragma once

#include <cstdint>

namespace thinkv::kernels {

inline constexpr uint32_t kSymbolCount = 256;
inline constexpr uint32_t kCodeBitsMax = 15;
inline constexpr uint32_t kCodeNodes = 2 * kSymbolCount - 1;

// A code of unlimited lengths in the making. Leaves are the first kSymbolCount nodes.
struct CodeTree {
  uint64_t weight[kCodeNodes];
  uint16_t parent[kCodeNodes];
  uint8_t depth[kCodeNodes];
};

// Gives every leaf its depth: two queues, leaves and sums in their order, and of equal weights the
// leaf first. Requires: weights of leaves ascend, of equal ones the lower symbol first; none is 0.
// Result: the largest depth.
constexpr uint32_t grow_code_tree(CodeTree& tree) {
  uint32_t leaf = 0;
  uint32_t inner = kSymbolCount;
  for (uint32_t next = kSymbolCount; next < kCodeNodes; ++next) {
    tree.weight[next] = 0;
    for (uint32_t child = 0; child < 2; ++child) {
      const bool take_leaf =
          leaf < kSymbolCount && (inner >= next || tree.weight[leaf] <= tree.weight[inner]);
      const uint32_t node = take_leaf ? leaf++ : inner++;
      tree.weight[next] += tree.weight[node];
      tree.parent[node] = static_cast<uint16_t>(next);
    }
  }
  uint32_t deepest = 0;
  tree.depth[kCodeNodes - 1] = 0;
  for (uint32_t node = kCodeNodes - 1; node-- > 0;) {
    const uint32_t depth = tree.depth[tree.parent[node]] + 1u;
    tree.depth[node] = static_cast<uint8_t>(depth);
    deepest = depth > deepest ? depth : deepest;
  }
  return deepest;
}

// Where a count goes before it is tried again with a shorter code: never 0.
[[nodiscard]] constexpr uint64_t halved_count(uint64_t count) {
  return (count + 1) / 2;
}

// By length: the first code, and how many symbols have shorter ones. Codes of one length follow
// each other in the order of their symbols.
struct CodeStarts {
  uint32_t code[kCodeBitsMax + 1];
  uint32_t before[kCodeBitsMax + 1];
};
// symbols: [kCodeBitsMax + 1] how many have that length.
[[nodiscard]] constexpr CodeStarts code_starts(const uint32_t* symbols) {
  CodeStarts starts{};
  uint32_t code = 0, before = 0;
  for (uint32_t bits = 1; bits <= kCodeBitsMax; ++bits) {
    code <<= 1;
    starts.code[bits] = code;
    starts.before[bits] = before;
    code += symbols[bits];
    before += symbols[bits];
  }
  return starts;
}

// True where the lengths make a complete code: no bits that mean nothing, none that mean two
// things.
[[nodiscard]] constexpr bool code_complete(const uint32_t* symbols) {
  uint32_t used = 0;
  for (uint32_t bits = 1; bits <= kCodeBitsMax; ++bits) {
    used += symbols[bits] << (kCodeBitsMax - bits);
  }
  return used == 1u << kCodeBitsMax;
}

}  // namespace thinkv::kernels
