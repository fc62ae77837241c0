// The law: if an array of a mask or a score does not fit a call, the call throws before it writes anything. Masks and
// scores check the sizes of every call, whichever functor, composition or stream makes it.
#include "longspan/call_sizes.hpp"

#include <algorithm>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "longspan/longspan.hpp"
#include "support/catch.hpp"
#include "support/refusal.hpp"
#include "support/tensor.hpp"

namespace {

using longspan::additive_bias;
using longspan::alibi;
using longspan::CallSizes;
using longspan::causal;
using longspan::dilated_attention;
using longspan::for_heads;
using longspan::gated;
using longspan::Index;
using longspan::infini_attention;
using longspan::landmark_attention;
using longspan::landmarks;
using longspan::merged;
using longspan::padding;
using longspan::per_head;
using longspan::serial;
using longspan::softmax_attention;
using longspan::TensorView;
using longspan::window;
using test::refusal;
using Branches = std::vector<longspan::Branch>;
constexpr Index most = std::numeric_limits<Index>::max();

/// The sizes with which `check` of a mask was called, as text, and whether the mask refuses them.
struct Asked {
  std::string sizes;
  bool refuses = false;
};

/// A causal mask that records the sizes with which its `check` is called.
struct picky {
  Asked* asked;
  Index unwanted_queries = -1;  ///< the mask refuses calls with this number of queries

  constexpr longspan::KeyRange keys(Index b, Index i) const { return causal{}.keys(b, i); }
  void check(const CallSizes& x) const {
    for (const Index size : {x.batch, x.heads, x.first_query, x.q_len, x.kv_len})
      asked->sizes += std::to_string(size) + " ";
    asked->sizes += std::string(x.function) + "\n";
    if (asked->refuses || x.q_len == unwanted_queries)
      longspan::detail::refuse(x.function, "picky", "checked", "no check");
  }
};

constexpr Index batch = 2, heads = 4, kv_heads = 2, dim = 4;

/// The tensors of a call with `queries` queries and `keys` keys. Outputs are 7 until they are written.
struct Tensors {
  test::Tensor<float> q, k, v, out;
  test::Rows<float> lse;

  explicit Tensors(Index queries, Index keys)
      : q(batch, heads, queries, dim, 0.5f),
        k(batch, kv_heads, keys, dim, 0.25f),
        v(batch, kv_heads, keys, dim, 1),
        out(batch, heads, queries, dim, 7),
        lse(batch, heads, queries, 7) {}

  template <class F>
  void call(const F& attend) {
    if constexpr (longspan::LseFunctor<F>) {
      attend(q.view(), k.view(), v.view(), out.view(), lse.view(), serial{});
    } else {
      attend(q.view(), k.view(), v.view(), out.view(), serial{});
    }
  }
  template <class S>
  void extend(S& stream) {
    stream.extend(q.view(), k.view(), v.view(), out.view(), serial{});
  }
  bool unwritten() const {
    const auto is_seven = [](float x) { return x == 7; };
    return std::all_of(out.values.begin(), out.values.end(), is_seven) &&
           std::all_of(lse.values.begin(), lse.values.end(), is_seven);
  }
};

/// The error text of a call, which must not change its outputs.
template <class F>
std::string refused(const F& attend, Index queries, Index keys) {
  Tensors tensors(queries, keys);
  const std::string text = refusal([&] { tensors.call(attend); });
  if (!text.empty()) CHECK(tensors.unwritten());
  return text;
}

constexpr const char* refused_by_mask = "longspan: softmax_attention: picky is checked, wanted no check";

}  // namespace

TEST_CASE("call sizes: every functor calls the check of its mask before it writes", "[law]") {
  Asked asked;
  const picky mask{&asked};
  const auto check = [&](const auto& attend, const std::string& sizes) {
    asked = {};
    CHECK(refused(attend, 3, 9) == "");
    CHECK(asked.sizes.substr(0, sizes.size()) == sizes);
    asked.refuses = true;
    CHECK(refused(attend, 3, 9).find("picky is checked") != std::string::npos);
  };
  softmax_attention plain{mask};
  check(plain, "2 4 6 3 9 softmax_attention\n");
  plain.first_query = 100;
  check(plain, "2 4 100 3 9 softmax_attention\n");
  check(dilated_attention{Branches{{4, 1}, {8, 2}}, mask}, "2 4 6 3 9 dilated_attention\n");
  check(landmark_attention{landmarks::every(3), mask}, "2 4 6 3 9 landmark_attention\n");
  const softmax_attention attend{causal{}};
  const softmax_attention asking{mask};
  check(merged{attend, asking}, "2 4 6 3 9 softmax_attention\n");
  check(merged{asking, attend}, "2 4 6 3 9 softmax_attention\n");
  check(gated{{}, attend, asking}, "2 4 6 3 9 softmax_attention\n");
  check(gated{{}, asking, attend}, "2 4 6 3 9 softmax_attention\n");
  check(per_head{for_heads{0, 2, attend}, for_heads{2, 4, asking}}, "2 2 6 3 9 softmax_attention\n");
  check(per_head{for_heads{0, 2, attend}, for_heads{2, 4, merged{attend, asking}}},
        "2 2 6 3 9 softmax_attention\n");
}

TEST_CASE("call sizes: infini_attention calls the check of its local mask for every segment before it writes",
          "[law]") {
  Asked asked;
  infini_attention attend{softmax_attention{picky{&asked}}};
  attend.segment = 4;
  CHECK(refused(attend, 9, 9) == "");
  CHECK(
      asked.sizes.starts_with("2 4 0 4 4 softmax_attention\n2 4 0 4 4 softmax_attention\n"
                              "2 4 0 1 1 softmax_attention\n"));
  attend.local.mask.unwanted_queries = 1;  // the last segment
  CHECK(refused(attend, 9, 9) == refused_by_mask);
  // infini_attention sets first_query of the local functor for each segment; the user's value does not count.
  attend.local.first_query = 77;
  CHECK(refused(attend, 8, 8) == "");
  // A batch row that ends within a segment is a separate call.
  const std::vector<Index> lengths{9, 3};
  attend.lengths = lengths;
  attend.local.mask.unwanted_queries = 3;
  CHECK(refused(attend, 9, 9) == refused_by_mask);
  asked = {.sizes = {}, .refuses = true};
  const softmax_attention plain{causal{}};
  CHECK(refused(per_head{for_heads{0, 2, plain}, for_heads{2, 4, attend}}, 9, 9) == refused_by_mask);
}

TEST_CASE("call sizes: every stream calls the check of its mask, and changes nothing if that throws",
          "[law][stream]") {
  Asked asked;
  const picky mask{&asked};
  const longspan::StreamShape shape{batch, heads, kv_heads, dim, dim};
  const auto check = [&](const auto& attend, const std::string& made, const std::string& extended) {
    asked = {};
    auto stream = attend.template stream<float>(shape);
    CHECK(asked.sizes == made);
    Tensors first(5, 5), second(2, 2);
    first.extend(stream);
    asked.sizes.clear();
    second.extend(stream);
    CHECK(asked.sizes.starts_with(extended));
    std::ostringstream before, after;
    stream.save(before);
    asked.refuses = true;
    Tensors third(2, 2);
    CHECK(refusal([&] { third.extend(stream); }).find("picky is checked") != std::string::npos);
    CHECK(third.unwritten());
    stream.save(after);
    CHECK(before.str() == after.str());
    CHECK(stream.size() == 7);
    CHECK(refusal([&] { attend.template stream<float>(shape); }).find("picky is checked") !=
          std::string::npos);
  };
  check(softmax_attention{mask}, "2 4 0 0 0 kv_cache\n", "2 4 5 2 7 kv_cache::extend\n");
  check(dilated_attention{Branches{{4, 1}, {8, 2}}, mask}, "2 4 0 0 0 dilated_cache\n",
        "2 4 5 2 7 dilated_cache::extend\n");
  infini_attention attend{softmax_attention{causal{} & mask}};
  attend.segment = 4;
  check(attend, "2 4 0 4 4 softmax_attention\n", "");
}

TEST_CASE("call sizes: calls and streams refuse arrays that are too small", "[law][errors]") {
  const std::vector<Index> one_length{4};
  const std::vector<float> slopes(2), bias(4 * 5);
  const auto short_bias = additive_bias(longspan::compact_view(bias.data(), 1, 1, 4, 5), 0);
  const std::string padded =
      "longspan: softmax_attention: the number of padding.lengths is 1, wanted 2, one for each batch row";
  for (const Index queries : {1, 5}) {  // the decode kernel and the prefill kernel
    CHECK(refused(softmax_attention{padding{one_length}}, queries, 5) == padded);
    CHECK(refused(softmax_attention{causal{} & !padding{one_length}}, queries, 5) == padded);
    CHECK(refused(softmax_attention{causal{}, alibi{slopes}}, queries, 5) ==
          "longspan: softmax_attention: the number of alibi.slopes is 2, wanted 4, one for each query head");
    CHECK(refused(softmax_attention{causal{}, short_bias}, queries, 5) != "");
    CHECK(refused(softmax_attention{causal{}, short_bias}, queries, 6) != "");
  }
  CHECK(refused(softmax_attention{causal{}, short_bias}, 4, 4) == "");
  // Heads are numbered from the start of a range.
  CHECK(refused(per_head{for_heads{0, 2, softmax_attention{causal{}, alibi{slopes}}},
                         for_heads{2, 4, softmax_attention{causal{}, alibi{slopes}}}},
                3, 3) == "");
  // A stream accepts a bias until it has more keys than the bias.
  const longspan::StreamShape shape{batch, heads, kv_heads, dim, dim};
  auto stream = softmax_attention{causal{}, short_bias}.stream<float>(shape);
  Tensors three(3, 3), two(2, 2);
  three.extend(stream);
  CHECK(refusal([&] { two.extend(stream); }) ==
        "longspan: kv_cache::extend: additive_bias.bias is [1, 1, 4, 5] with first_query 0, wanted a row for "
        "each "
        "of the 2 queries from position 3 on");
  CHECK(two.unwritten());
  CHECK(stream.size() == 3);
  CHECK(refusal([&] { (softmax_attention{padding{one_length}}.stream<float>(shape)); }).find("padding") !=
        std::string::npos);
  // The zeros that torchscale appends are keys too.
  dilated_attention padded_keys{Branches{{4, 3}}, short_bias};
  CHECK(refused(padded_keys, 4, 4) == "");
  padded_keys.zero_pad_compat = true;
  CHECK(refused(padded_keys, 4, 4) ==
        "longspan: dilated_attention: additive_bias.bias is [1, 1, 4, 5], wanted [1 or 2, 1 or 4, 1 or "
        "q_len, at "
        "least 6]");
}

TEST_CASE("call sizes: a view that cannot refer to real memory is refused by name", "[errors]") {
  const softmax_attention attend{causal{}};
  const auto said = [&](const auto& bend) {
    Tensors x(3, 3);
    struct {
      TensorView<float> q, k, v, out;
      longspan::RowsView<float> lse;
    } views{x.q.view(), x.k.view(), x.v.view(), x.out.view(), x.lse.view()};
    bend(views);
    const std::string text =
        refusal([&] { attend(views.q, views.k, views.v, views.out, views.lse, serial{}); });
    CHECK(x.unwritten());
    return text;
  };
  CHECK(said([](auto& x) { x.q.rows = x.out.rows = x.lse.rows = -3; }) ==
        "longspan: softmax_attention: q is [2, 4, -3, 4], wanted no negative size");
  CHECK(said([](auto& x) { x.k.rows = x.v.rows = -1; }) ==
        "longspan: softmax_attention: k is [2, 2, -1, 4], wanted no negative size");
  CHECK(said([](auto& x) { x.v.cols = x.out.cols = -4; }) ==
        "longspan: softmax_attention: v is [2, 2, 3, -4], wanted no negative size");
  CHECK(said([](auto& x) { x.lse.batch = -1; }) ==
        "longspan: softmax_attention: lse is [-1, 4, 3], wanted no negative size");
  CHECK(said([](auto& x) { x.k.rows = x.v.rows = most; }) ==
        "longspan: softmax_attention: k is [2, 2, 9223372036854775807, 4], wanted at most 2^60 elements");
  CHECK(said([](auto& x) { x.k.data = nullptr; }) ==
        "longspan: softmax_attention: k is [2, 2, 3, 4], wanted memory for its elements, not null");
  CHECK(said([](auto& x) { x.lse.data = nullptr; }) ==
        "longspan: softmax_attention: lse is [2, 4, 3], wanted memory for its elements, not null");
  CHECK(said([](auto& x) {
          x.q.rows = x.k.rows = x.v.rows = x.out.rows = x.lse.rows = 0;
          x.k.data = x.v.data = nullptr;
        }) == "");

  Tensors x(3, 3);
  auto stream = attend.stream<float>({batch, heads, kv_heads, dim, dim});
  TensorView<float> k = x.k.view(), v = x.v.view();
  k.rows = v.rows = -3;
  CHECK(refusal([&] { stream.append(k, v, serial{}); }) ==
        "longspan: kv_cache::append: k is [2, 2, -3, 4], wanted no negative size");
  CHECK(
      refusal([] {
        softmax_attention<>{}.stream<float>({Index{1} << 31, Index{1} << 31, 1, 4, 4});
      }) ==
      "longspan: kv_cache: the shape [batch, heads, head_dim, value_dim] is [2147483648, 2147483648, 4, 4], "
      "wanted at most 2^60 elements");
}

TEST_CASE("call sizes: an option that is not finite is refused before a stream changes", "[errors][stream]") {
  const longspan::StreamShape shape{batch, heads, kv_heads, dim, dim};
  softmax_attention attend{causal{}};
  attend.scale = std::numeric_limits<double>::quiet_NaN();
  dilated_attention dilated{Branches{{4, 1}, {8, 2}}, causal{}};
  dilated.scale = std::numeric_limits<double>::infinity();
  CHECK(refusal([&] { attend.stream<float>(shape); }) ==
        "longspan: kv_cache: scale is nan, wanted a finite number");
  CHECK(refusal([&] { dilated.stream<float>(shape); }).find("scale is inf") != std::string::npos);
  infini_attention infini{attend};
  CHECK(refused(infini, 3, 3) == "longspan: softmax_attention: scale is nan, wanted a finite number");
  CHECK(refusal([&] { infini.stream<float>(shape); }).find("scale is nan") != std::string::npos);
  infini.local.scale = 1;
  const std::vector<Index> negative{3, -1};
  infini.lengths = negative;
  CHECK(refused(infini, 3, 3) == "longspan: infini_attention: one of the lengths is -1, wanted at least 0");
  infini.lengths = {};
  for (const Index segment : {Index{0}, Index{-1}}) {
    infini.segment = segment;
    CHECK(refused(infini, 3, 3).find("the segment is ") != std::string::npos);
    CHECK(refusal([&] { infini.stream<float>(shape); }).find("the segment is ") != std::string::npos);
  }
  infini.segment = most;
  CHECK(refused(infini, 3, 3) == "");
  CHECK(refused(landmark_attention{landmarks::every(0)}, 3, 3) != "");
  const std::vector<Index> falling{2, 1}, beyond{1, 3};
  CHECK(refused(landmark_attention{landmarks::at(falling)}, 3, 3) != "");
  CHECK(refused(landmark_attention{landmarks::at(beyond)}, 3, 3) != "");
  landmark_attention controlled{landmarks::every(2)};
  const std::vector<float> cmt(static_cast<std::size_t>(batch * heads * 3));
  controlled.control.cmt = longspan::compact_rows_view(cmt.data(), batch, heads, 3);
  controlled.control.blocks = {nullptr, 1, 1, 1};
  CHECK(refused(controlled, 3, 3).find("control.blocks is [1, 1], wanted memory") != std::string::npos);
  const std::vector<unsigned char> kinds(1);
  controlled.control.blocks = {kinds.data(), 1, 1, 1};
  CHECK(refused(controlled, 3, 3) == "");
  controlled.control.cutoff = std::numeric_limits<double>::quiet_NaN();
  CHECK(refused(controlled, 3, 3).find("control.cutoff is nan") != std::string::npos);
}

TEST_CASE("call sizes: queries at the ends of the position range see the right keys or are refused",
          "[limits]") {
  constexpr Index far = Index{1} << 62;
  Tensors x(2, 3);
  const auto mean = [&](auto attend, Index first_query) {
    attend.first_query = first_query;
    const std::string text = refusal([&] { x.call(attend); });
    return text.empty() ? std::to_string(x.out.values.front()) : text;
  };
  const std::vector<float> slopes{0, 1, 0, 1};
  for (const Index first : {far, far - 7, Index{3}}) {
    CHECK(mean(softmax_attention{causal{}}, first) == "1.000000");
    CHECK(mean(softmax_attention{causal{}, alibi{slopes}}, first) == "1.000000");
    CHECK(mean(softmax_attention{causal{} & window{.left = most}}, first) == "1.000000");
    CHECK(mean(softmax_attention{window{.left = 0}}, first) == "0.000000");
    CHECK(mean(landmark_attention{landmarks::every(2)}, first) == "1.000000");
  }
  CHECK(mean(softmax_attention{window{.left = 2, .right = most}}, 0) == "1.000000");
  CHECK(mean(softmax_attention{causal{}}, -far) == "0.000000");
  CHECK(mean(softmax_attention{!causal{}}, -far) == "1.000000");
  for (const Index first : {far + 1, most, -far - 1, -most}) {
    const std::string wanted =
        ": first_query is " + std::to_string(first) + ", wanted a position between -2^62 and 2^62";
    CHECK(mean(softmax_attention{causal{}}, first) == "longspan: softmax_attention" + wanted);
    CHECK(mean(dilated_attention{Branches{{4, 1}}}, first) == "longspan: dilated_attention" + wanted);
    CHECK(mean(landmark_attention{landmarks::every(2)}, first) == "longspan: landmark_attention" + wanted);
    CHECK(refusal([&] {
            longspan::encode_positions(x.q.view(), longspan::rotary(longspan::Pairing::half_split), first,
                                       longspan::Role::query);
          }).find("encode_positions: first_position is ") != std::string::npos);
  }
}
