// A row of advantages.cpp where registers hold sixteen floats (x86-64-v4).
//
// While a trace goes on it decays as ever, so what a step takes from a step behind it is a
// power of the decay, known beforehand, and one bit that says whether the trace gets there. The
// bits of sixty-four steps are a word, and are joined by shifting it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gae.h"
#include "wide.h"

namespace alignkit {
namespace {
constexpr int kTile = 256;  // steps of a row that are walked at a time
}  // namespace
}  // namespace alignkit

#ifdef ALIGNKIT_V4
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")

namespace alignkit {
namespace {

using Word = std::uint64_t;
using Lanes = __m512;
constexpr int kWord = 64, kLanes = 16;

// Flags of up to sixty-four steps; the highest bit is the last step.
struct Flags {
  Word ends;         // no value after it
  Word cuts;         // the value after it is the bootstrap
  Word unsupported;  // the value after it is v_min
  Word floored;      // the step before it is unsupported
};

// Each points just behind the steps in question.
struct Steps {
  const float* rewards;
  const float* values;
  const float* bootstrap;
  float* advantages;
  float* targets;
};

// The highest `n` bits.
inline Word last(int n) { return ~Word{0} << (kWord - n); }

// Which of the `there` bytes before `end` are set. Masked loads touch nothing else.
inline Word bits_before(const std::uint8_t* end, Word there) {
  const __m512i bytes = _mm512_maskz_loadu_epi8(there, end - kWord);
  return _mm512_test_epi8_mask(bytes, bytes);
}

// Bits that are appended, and read in words that end anywhere.
class Bits {
 public:
  void append(int at, Word bits) {
    const int word = at / kWord + 1, shift = at % kWord;
    words[word] |= bits << shift;
    if (shift) words[word + 1] |= bits >> (kWord - shift);
  }

  void set_before_first(bool bit) { words[0] = Word{bit} << (kWord - 1); }

  Word before(int end) const {
    const int word = end / kWord, shift = end % kWord;
    return shift ? words[word] >> shift | words[word + 1] << (kWord - shift) : words[word];
  }

 private:
  Word words[kTile / kWord + 2] = {};
};

// The steps of a tile that count, side by side. Registers are stored whole: room behind them.
struct Counted {
  float rewards[kTile + kLanes];
  float values[kTile + kLanes];
  float bootstrap[kTile + kLanes];
  float advantages[kTile + kLanes];
  float targets[kTile + kLanes];
};

// What every register of steps needs. Functions hold a copy, or each store of an advantage
// would have it loaded again.
struct Constants {
  explicit Constants(const GaeArguments& x)
      : gamma(_mm512_set1_ps(x.gamma)),
        v_min(_mm512_set1_ps(x.v_min)),
        decay(_mm512_set1_ps(x.decay)),
        decay2(_mm512_mul_ps(decay, decay)),
        decay4(_mm512_mul_ps(decay2, decay2)),
        decay8(_mm512_mul_ps(decay4, decay4)),
        steps(x.decay == 0.0f ? 0 : ~Word{0}) {
    float powers[kLanes];
    double power = 1.0;
    for (int i = kLanes - 1; i >= 0; --i) powers[i] = static_cast<float>(power *= x.decay);
    to_next = _mm512_loadu_ps(powers);
  }

  Lanes gamma, v_min, decay, decay2, decay4, decay8;
  Lanes to_next;  // from each lane to the step behind the last
  Word steps;     // that the trace may pass
};

template <class G>
class WideRow {
 public:
  struct Workspace {
    explicit Workspace(const GaeArguments& x) : constants(x) {}

    Constants constants;
    Counted counted;
  };

  WideRow(const GaeArguments& args, std::int64_t row)
      : x(args),
        start(row_start(row, args.T)),
        values(args.values + row_start(row, args.T + 1)),
        next_value(args.terminated ? values[args.T] : 0.0f),
        behind(_mm512_setzero_ps()) {}

  // The `n` steps from `t` on; those behind them are done. A function for itself: in one with
  // all the others, registers run out.
  __attribute__((noinline)) void walk(std::int64_t t, int n, Workspace& work) {
    if constexpr (G::mask) {
      const std::uint8_t* mask = x.mask + start + t;
      const int count = count_set(mask, n);
      if (count == 0) return zeros(t, n);
      if (count < n || (t + n < x.T && !mask[n])) return walk_counted(t, n, work);
    }
    const std::int64_t begin = start + t;
    const Constants constants = work.constants;
    Lanes next = behind;
    for (int end = n; end > 0; end -= kWord) {
      const int size = std::min(kWord, end);
      const Steps steps = {x.rewards + begin + end, values + t + end,
                           bootstrap(t) + end, x.advantages + begin + end,
                           x.targets + begin + end};
      next = scan(constants, flags(t + end, last(size)), steps, size, next);
    }
    behind = next;
    next_value = values[t];
  }

  void finish() const {}

 private:
  static int count_set(const std::uint8_t* mask, int n) {
    int count = 0;
    for (int end = n; end > 0; end -= kWord)
      count += __builtin_popcountll(bits_before(mask + end, last(std::min(kWord, end))));
    return count;
  }

  const float* bootstrap(std::int64_t t) const {
    return G::cut && x.bootstrap ? x.bootstrap + start + t : values + t + 1;
  }

  void zeros(std::int64_t t, int n) const {
    std::fill_n(x.advantages + start + t, n, 0.0f);
    if constexpr (G::floor) std::fill_n(x.targets + start + t, n, 0.0f);
  }

  // Of the `there` steps before `end`.
  Flags flags(std::int64_t end, Word there) const {
    Flags f = {};
    if constexpr (G::end) f.ends = bits_before(x.terminated + start + end, there);
    else if (end == x.T && !x.terminated) f.ends = last(1);
    if constexpr (G::cut) f.cuts = bits_before(x.truncated + start + end, there);
    if constexpr (G::floor) {
      const std::uint8_t* supported = x.supported + start + end;
      f.unsupported = there & ~bits_before(supported, there);
      const Word behind_first = end <= kWord ? there & there << 1 : there;
      f.floored = behind_first & ~bits_before(supported - 1, behind_first);
    }
    return f;
  }

  // What the step `kBy` lanes behind has, decayed, is added where the trace gets there.
  template <int kBy>
  static Lanes joined(Lanes a, Lanes decay, __mmask16 gets_there) {
    typedef std::int32_t Index __attribute__((vector_size(sizeof(Lanes))));
    constexpr Index kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Lanes ahead = __builtin_shuffle(a, Lanes{}, kLane + kBy);
    return _mm512_mask3_fmadd_ps(ahead, decay, a, gets_there);
  }

  // The `n` steps before `end`, at most a word of them. Takes the advantage of the step at
  // `end`, and returns that of the first where registers are full, in every lane.
  static Lanes scan(const Constants& constants, const Flags& f, const Steps& end, int n,
                    Lanes next) {
    const auto [gamma, v_min, decay, decay2, decay4, decay8, to_next, steps] = constants;
    const Word on = steps & ~(f.ends | f.cuts | f.unsupported);
    const Word on2 = on & on >> 1, on4 = on2 & on2 >> 2, on8 = on4 & on4 >> 4;
    const auto sixteen = [&](int i, __mmask16 there) {
      const int shift = kWord - kLanes - i, at = -kLanes - i;
      const auto lanes = [&](Word bits) { return static_cast<__mmask16>(bits >> shift); };
      const auto load = [&](const float* p) { return _mm512_maskz_loadu_ps(there, p + at); };
      const Lanes value = load(end.values);
      Lanes reward = load(end.rewards), after = load(end.values + 1);
      if constexpr (G::cut)
        after = _mm512_mask_mov_ps(after, lanes(f.cuts), load(end.bootstrap));
      after = _mm512_maskz_mov_ps(lanes(~f.ends), after);
      if constexpr (G::floor) {
        after = _mm512_mask_mov_ps(after, lanes(f.unsupported), v_min);
        reward = _mm512_maskz_mov_ps(lanes(~f.unsupported), reward);
      }
      Lanes a = _mm512_sub_ps(_mm512_fmadd_ps(gamma, after, reward), value);
      a = joined<1>(a, decay, lanes(on));
      a = joined<2>(a, decay2, lanes(on2));
      a = joined<4>(a, decay4, lanes(on4));
      a = joined<8>(a, decay8, lanes(on8));
      // lanes behind the last one where the trace stops
      const std::uint32_t stops = static_cast<std::uint16_t>(~on >> shift);
      const std::uint32_t open = ~0u << (32 - _lzcnt_u32(stops));
      a = _mm512_mask3_fmadd_ps(next, to_next, a, static_cast<__mmask16>(open));
      next = _mm512_set1_ps(a[0]);
      _mm512_mask_storeu_ps(end.advantages + at, there, a);
      if constexpr (G::floor) {
        const Lanes target =
            _mm512_mask_mov_ps(_mm512_add_ps(a, value), lanes(f.floored), v_min);
        _mm512_mask_storeu_ps(end.targets + at, there, target);
      }
    };
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) sixteen(i, 0xffff);
    if (i < n) sixteen(i, static_cast<__mmask16>(0xffff << (kLanes - (n - i))));
    return next;
  }

  // The same of a tile in which steps are skipped: what counts is moved together, and the
  // results back apart.
  void walk_counted(std::int64_t t, int n, Workspace& work) {
    const std::int64_t begin = start + t;
    const std::uint8_t* mask = x.mask + begin;
    Counted& c = work.counted;
    Bits ends, cuts, unsupported;
    int count = 0;
    for (int i = 0; i < n; i += kWord) {
      const int size = std::min(kWord, n - i);
      const Word shift = kWord - size;
      const auto bits = [&](const std::uint8_t* flags) {
        return bits_before(flags + i + size, last(size)) >> shift;
      };
      const Word counts = bits(mask);
      const auto append = [&](Bits& to, Word flags) { to.append(count, _pext_u64(flags, counts)); };
      if constexpr (G::end) append(ends, bits(x.terminated + begin));
      if constexpr (G::cut) append(cuts, bits(x.truncated + begin));
      if constexpr (G::floor) append(unsupported, ~bits(x.supported + begin));
      for (int j = 0; j < size; j += kLanes) {
        const auto some = static_cast<__mmask16>(counts >> j);
        const auto move = [&](const float* from, float* to) {
          const Lanes lanes = _mm512_maskz_loadu_ps(some, from + i + j);
          _mm512_storeu_ps(to + count, _mm512_maskz_compress_ps(some, lanes));
        };
        move(x.rewards + begin, c.rewards);
        move(values + t, c.values);
        if constexpr (G::cut) move(bootstrap(t), c.bootstrap);
        count += __builtin_popcount(some);
      }
    }
    c.values[count] = next_value;
    next_value = c.values[0];
    if constexpr (G::floor) unsupported.set_before_first(follows_unsupported(t));
    Lanes next = behind;
    for (int end = count; end > 0; end -= kWord) {
      const Flags f = {ends.before(end), cuts.before(end), unsupported.before(end),
                       G::floor ? unsupported.before(end - 1) : 0};
      const Steps steps = {c.rewards + end, c.values + end, c.bootstrap + end,
                           c.advantages + end, c.targets + end};
      next = scan(work.constants, f, steps, std::min(kWord, end), next);
    }
    behind = _mm512_set1_ps(c.advantages[0]);
    spread(c.advantages, mask, n, x.advantages + begin);
    if constexpr (G::floor) spread(c.targets, mask, n, x.targets + begin);
  }

  // Whether the last step that counts before `t` is unsupported.
  bool follows_unsupported(std::int64_t t) const {
    for (std::int64_t i = start + t - 1; i >= start; --i)
      if (x.mask[i]) return !x.supported[i];
    return false;
  }

  // Zeros where the mask is zero, and what counts in between.
  static void spread(const float* from, const std::uint8_t* mask, int n, float* to) {
    for (int i = 0; i < n; i += kLanes) {
      const auto there = static_cast<__mmask16>((1u << std::min(kLanes, n - i)) - 1);
      const __m128i bytes = _mm_maskz_loadu_epi8(there, mask + i);
      const __mmask16 some = _mm_test_epi8_mask(bytes, bytes);
      _mm512_mask_storeu_ps(to + i, there, _mm512_maskz_expand_ps(some, _mm512_loadu_ps(from)));
      from += __builtin_popcount(some);
    }
  }

  const GaeArguments& x;
  const std::int64_t start;
  const float* values;
  float next_value;  // of the next step that counts
  Lanes behind;      // its advantage, in every lane
};

}  // namespace
}  // namespace alignkit

#pragma GCC pop_options
#endif
