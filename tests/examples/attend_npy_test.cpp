// attend_npy as a program: its variants compared with the references, and errors.
#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "attend_npy_program.hpp"
#include "examples/attend_npy/npy.hpp"
#include "longspan/longspan.hpp"
#include "longspan/reference/dilated_attention.hpp"
#include "longspan/reference/softmax_attention.hpp"
#include "support/catch.hpp"
#include "temporary_folder.hpp"

#if defined(__SANITIZE_ADDRESS__)
#define LONGSPAN_TEST_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LONGSPAN_TEST_ADDRESS_SANITIZER
#endif
#endif

namespace {

using longspan::Index;

/// A tensor in double whose values are exact in float32.
struct Values {
  std::vector<Index> shape;
  std::vector<double> values;

  longspan::TensorView<const double> view() const {
    return longspan::compact_view(values.data(), shape[0], shape[1], shape[2], shape[3]);
  }
  Values absolute() const {
    Values result = *this;
    for (double& x : result.values) x = std::abs(x);
    return result;
  }
  template <class T>
  Values rounded_to() const {
    Values result = *this;
    for (double& x : result.values) x = static_cast<double>(static_cast<T>(x));
    return result;
  }
};

Values random_values(const std::vector<Index>& shape, unsigned seed) {
  std::mt19937 random(seed);
  Values x{shape, std::vector<double>(static_cast<std::size_t>(*npy::value_count(shape)))};
  for (double& value : x.values) value = static_cast<double>(random() >> 8) * 0x1p-22 - 2;
  return x;
}

/// q, k and v of grouped-query attention, saved as float32.
struct Inputs {
  Values q = random_values({2, 6, 19, 24}, 1), k = random_values({2, 2, 37, 24}, 2),
         v = random_values({2, 2, 37, 5}, 3);

  template <class T>
  void save_as(const TemporaryFolder& folder) const {
    save<T>(folder, "q.npy", q.shape, q.values);
    save<T>(folder, "k.npy", k.shape, k.values);
    save<T>(folder, "v.npy", v.shape, v.values);
  }
};

const std::string files = " --q q.npy --k k.npy --v v.npy --out out.npy";

std::vector<double> values_of(const npy::Array& array) {
  return std::visit([](const auto& values) { return std::vector<double>(values.begin(), values.end()); },
                    array.values);
}

bool holds_doubles(const npy::Array& array) {
  return std::holds_alternative<std::vector<double>>(array.values);
}

/// The largest scale * sum_c |q_ic k_jc| of any query and key: at least a_i of the error bound.
double condition(const Inputs& in, double scale) {
  const auto q = in.q.view(), k = in.k.view();
  double largest = 0;
  for (Index b = 0; b < q.batch; ++b) {
    for (Index h = 0; h < q.heads; ++h) {
      for (Index i = 0; i < q.rows; ++i) {
        for (Index j = 0; j < k.rows; ++j) {
          const double *x = q.row(b, h, i), *y = k.row(b, h / (q.heads / k.heads), j);
          largest =
              std::max(largest, std::transform_reduce(x, x + q.cols, y, 0.0, std::plus<>(),
                                                      [](double s, double t) { return std::abs(s * t); }));
        }
      }
    }
  }
  return std::abs(scale) * largest;
}

/// Compares out and lse in the folder with the oracle, within the bound of softmax_attention.
template <class Mask, class Score>
void check_outputs(const TemporaryFolder& folder, const Inputs& in, const Mask& mask, const Score& score,
                   std::optional<double> scale, double unit) {
  const std::size_t rows = static_cast<std::size_t>(in.q.shape[0] * in.q.shape[1] * in.q.shape[2]);
  const std::size_t value_dim = static_cast<std::size_t>(in.v.shape[3]);
  std::vector<double> exact(rows * value_dim), gauge(rows * value_dim), exact_lse(rows);
  const auto view_of = [&](std::vector<double>& x) {
    return longspan::compact_view(x.data(), in.q.shape[0], in.q.shape[1], in.q.shape[2], in.v.shape[3]);
  };
  longspan::softmax_attention attend{mask, score};
  attend.scale = scale;
  const longspan::reference::exact oracle{attend};
  const Values absolute = in.v.absolute();
  oracle(in.q.view(), in.k.view(), in.v.view(), view_of(exact),
         longspan::compact_rows_view(exact_lse.data(), in.q.shape[0], in.q.shape[1], in.q.shape[2]));
  oracle(in.q.view(), in.k.view(), absolute.view(), view_of(gauge));

  const std::vector<double> out = values_of(npy::read(folder.file("out.npy")));
  const std::vector<double> lse = values_of(npy::read(folder.file("lse.npy")));
  REQUIRE(out.size() == exact.size());
  REQUIRE(lse.size() == exact_lse.size());
  const double a = condition(in, scale.value_or(1 / std::sqrt(static_cast<double>(in.q.shape[3]))));
  int wrong = 0, wrong_lse = 0;  // counted so that NaN counts as wrong
  for (std::size_t n = 0; n < out.size(); ++n) {
    wrong += !(std::abs(out[n] - exact[n]) <= 16 * unit * (1 + a) * gauge[n]);
  }
  for (std::size_t n = 0; n < lse.size(); ++n) {
    wrong_lse += !(std::abs(lse[n] - exact_lse[n]) <= 16 * unit * (1 + a + std::abs(exact_lse[n])));
  }
  CHECK(wrong == 0);
  CHECK(wrong_lse == 0);
}

constexpr double unit_of_float = 0x1p-24, unit_of_double = 0x1p-53;

}  // namespace

TEST_CASE("attend_npy softmax: agrees with the oracle for every key", "[attend_npy][oracle]") {
  const TemporaryFolder folder;
  const Inputs in;
  in.save_as<float>(folder);
  const auto check = [&](const std::string& keys, const auto& mask, const auto& score,
                         std::optional<double> scale) {
    for (const bool in_double : {false, true}) {
      CAPTURE(keys, in_double);
      const Outcome outcome =
          run(folder, "softmax " + keys + files + " --lse lse.npy" + (in_double ? " --dtype f64" : ""));
      REQUIRE(outcome.err == "");
      REQUIRE(outcome.out == "");
      REQUIRE(outcome.exit_code == 0);
      check_outputs(folder, in, mask, score, scale, in_double ? unit_of_double : unit_of_float);
    }
  };
  using longspan::causal, longspan::everything, longspan::softcap, longspan::unchanged, longspan::window;
  check("", everything{}, unchanged{}, {});
  check("causal=0", everything{}, unchanged{}, {});
  check("causal=1", causal{}, unchanged{}, {});
  check("window=7", window{.left = 6, .right = 6}, unchanged{}, {});
  check("window=1", window{.left = 0, .right = 0}, unchanged{}, {});
  check("causal=1 window=7", causal{} & window{.left = 6}, unchanged{}, {});
  check("window=9223372036854775807 causal=1", causal{}, unchanged{}, {});
  check("scale=0.5", everything{}, unchanged{}, 0.5);
  check("scale=-1.5e-1", everything{}, unchanged{}, -0.15);
  check("softcap=1.5", everything{}, softcap{1.5f}, {});
  check("softcap=1.5 scale=2 window=9 causal=1", causal{} & window{.left = 8}, softcap{1.5f}, 2.0);
}

TEST_CASE("attend_npy dilated: agrees with the oracle for every key", "[attend_npy][oracle]") {
  using longspan::Branch, longspan::Overlap, longspan::Phase;
  const TemporaryFolder folder;
  const Inputs in;
  in.save_as<float>(folder);
  const auto check = [&](const std::string& keys, const auto& oracle) {
    CAPTURE(keys);
    const Outcome outcome = run(folder, "dilated " + keys + files + " --lse lse.npy --dtype f64");
    REQUIRE(outcome.err == "");
    REQUIRE(outcome.exit_code == 0);
    std::vector<double> exact(2 * 6 * 19 * 5), exact_lse(2 * 6 * 19);
    oracle(in.q.view(), in.k.view(), in.v.view(), longspan::compact_view(exact.data(), 2, 6, 19, 5),
           longspan::compact_rows_view(exact_lse.data(), 2, 6, 19));
    const std::vector<double> out = values_of(npy::read(folder.file("out.npy")));
    const std::vector<double> lse = values_of(npy::read(folder.file("lse.npy")));
    int wrong = 0;
    for (std::size_t n = 0; n < out.size(); ++n) wrong += !(std::abs(out[n] - exact[n]) <= 1e-12);
    for (std::size_t n = 0; n < lse.size(); ++n)
      wrong += !(lse[n] == exact_lse[n] || std::abs(lse[n] - exact_lse[n]) <= 1e-12);
    CHECK(wrong == 0);
  };
  longspan::dilated_attention attend{std::vector<Branch>{{8, 1}, {16, 2}, {64, 4}}};
  const std::string branches = "segments=8,16,64 dilations=1,2,4";
  check(branches, longspan::reference::exact{attend});
  attend.phase = Phase::blocked;
  check(branches + " phase=blocked overlap=multiset", longspan::reference::exact{attend});
  attend.overlap = Overlap::set;
  attend.scale = 0.5;
  check(branches + " phase=blocked overlap=set scale=0.5", longspan::reference::exact{attend});
  attend = longspan::dilated_attention{std::vector<Branch>{{8, 1}}};
  attend.zero_pad_compat = true;
  check("segments=8 zero_pad=1", longspan::reference::exact{attend});
  check(branches + " causal=1", longspan::reference::exact{longspan::dilated_attention{
                                    std::vector<Branch>{{8, 1}, {16, 2}, {64, 4}}, longspan::causal{}}});
}

TEST_CASE("attend_npy softmax: window=W shows the keys less than W positions away", "[attend_npy][exact]") {
  // With equal scores and 2^n keys, out is exactly the mean of the visible values.
  const TemporaryFolder folder;
  const Index length = 12;
  std::vector<double> places(static_cast<std::size_t>(length));
  std::iota(places.begin(), places.end(), 0.0);
  save<float>(folder, "q.npy", {length, 1}, std::vector<double>(12, 0.0));
  save<float>(folder, "k.npy", {length, 1}, std::vector<double>(12, 0.0));
  save<float>(folder, "v.npy", {length, 1}, places);
  REQUIRE(run(folder, "softmax window=4 causal=1" + files).exit_code == 0);
  CHECK(values_of(npy::read(folder.file("out.npy")))[9] == (6 + 7 + 8 + 9) / 4.0);
  // Without causal the last query still sees four keys, and the first query the keys after it.
  REQUIRE(run(folder, "softmax window=4" + files).exit_code == 0);
  CHECK(values_of(npy::read(folder.file("out.npy")))[0] == (0 + 1 + 2 + 3) / 4.0);
  CHECK(values_of(npy::read(folder.file("out.npy")))[11] == (8 + 9 + 10 + 11) / 4.0);
}

TEST_CASE("attend_npy: --dtype is the type of the kernel and determines the type of the outputs",
          "[attend_npy][oracle]") {
  const TemporaryFolder folder;
  const Inputs in;
  const bool doubles_in = GENERATE(false, true);
  if (doubles_in) {
    in.save_as<double>(folder);
  } else {
    in.save_as<float>(folder);
  }
  const auto check = [&](const std::string& dtype, const Inputs& seen, bool doubles_out) {
    CAPTURE(dtype, doubles_in);
    const Outcome outcome = run(folder, "softmax causal=1" + files + " --lse lse.npy" + dtype);
    REQUIRE(outcome.err == "");
    REQUIRE(outcome.exit_code == 0);
    CHECK(holds_doubles(npy::read(folder.file("out.npy"))) == doubles_out);
    CHECK(holds_doubles(npy::read(folder.file("lse.npy"))) == doubles_out);
    check_outputs(folder, seen, longspan::causal{}, longspan::unchanged{}, {},
                  doubles_out ? unit_of_double : unit_of_float);
  };
  const auto rounded = [&]<class T>(T) {
    return Inputs{in.q.rounded_to<T>(), in.k.rounded_to<T>(), in.v.rounded_to<T>()};
  };
  check("", in, doubles_in);
  check(" --dtype f32", in, false);
  check(" --dtype f64", in, true);
  check(" --dtype bf16", rounded(Eigen::bfloat16()), false);
  check(" --dtype f16", rounded(Eigen::half()), false);
}

TEST_CASE("attend_npy: one float64 file among float32 files makes the call double", "[attend_npy]") {
  const TemporaryFolder folder;
  const Inputs in;
  in.save_as<float>(folder);
  save<double>(folder, "k.npy", in.k.shape, in.k.values);
  REQUIRE(run(folder, "softmax" + files + " --lse lse.npy").exit_code == 0);
  CHECK(holds_doubles(npy::read(folder.file("out.npy"))));
  check_outputs(folder, in, longspan::everything{}, longspan::unchanged{}, {}, unit_of_double);
}

TEST_CASE("attend_npy: outputs have the rank of q", "[attend_npy]") {
  const TemporaryFolder folder;
  const Values q = random_values({1, 1, 6, 8}, 1), k = random_values({1, 1, 9, 8}, 2),
               v = random_values({1, 1, 9, 3}, 3);
  const auto last = [](const std::vector<Index>& shape, std::size_t rank) {
    return std::vector<Index>(shape.end() - static_cast<std::ptrdiff_t>(rank), shape.end());
  };
  std::vector<double> first_out;
  for (const std::size_t rank : {4u, 3u, 2u}) {
    CAPTURE(rank);
    save<float>(folder, "q.npy", last(q.shape, rank), q.values);
    save<float>(folder, "k.npy", last(k.shape, rank), k.values);
    save<float>(folder, "v.npy", last(v.shape, rank), v.values);
    REQUIRE(run(folder, "softmax" + files + " --lse lse.npy").exit_code == 0);
    const npy::Array out = npy::read(folder.file("out.npy"));
    CHECK(out.shape == last({1, 1, 6, 3}, rank));
    CHECK(npy::read(folder.file("lse.npy")).shape == last({1, 1, 6}, rank - 1));
    if (first_out.empty()) first_out = values_of(out);
    CHECK(values_of(out) == first_out);
  }
}

TEST_CASE("attend_npy: sizes of 0 are allowed", "[attend_npy]") {
  const TemporaryFolder folder;
  const auto shapes_of = [&](const std::vector<Index>& q, const std::vector<Index>& k,
                             const std::vector<Index>& v) {
    save<float>(folder, "q.npy", q, std::vector<double>(static_cast<std::size_t>(*npy::value_count(q)), 1.0));
    save<float>(folder, "k.npy", k, std::vector<double>(static_cast<std::size_t>(*npy::value_count(k)), 1.0));
    save<float>(folder, "v.npy", v, std::vector<double>(static_cast<std::size_t>(*npy::value_count(v)), 1.0));
    const Outcome outcome = run(folder, "softmax causal=1" + files + " --lse lse.npy");
    REQUIRE(outcome.err == "");
    return npy::read(folder.file("out.npy"));
  };
  CHECK(shapes_of({1, 2, 0, 4}, {1, 1, 3, 4}, {1, 1, 3, 5}).shape == std::vector<Index>{1, 2, 0, 5});
  CHECK(shapes_of({0, 2, 3, 4}, {0, 1, 3, 4}, {0, 1, 3, 5}).shape == std::vector<Index>{0, 2, 3, 5});
  CHECK(shapes_of({1, 2, 3, 4}, {1, 1, 3, 4}, {1, 1, 3, 0}).shape == std::vector<Index>{1, 2, 3, 0});

  // Without keys no row sees a key.
  CHECK(values_of(shapes_of({1, 2, 3, 4}, {1, 1, 0, 4}, {1, 1, 0, 5})) == std::vector<double>(30, 0.0));
  CHECK(values_of(npy::read(folder.file("lse.npy"))) ==
        std::vector<double>(6, -std::numeric_limits<double>::infinity()));
}

TEST_CASE("attend_npy: the bits do not depend on --threads", "[attend_npy]") {
  const TemporaryFolder folder;
  Inputs().save_as<float>(folder);
  std::string first;
  for (const std::string threads : {"1", "2", "3", "7"}) {
    REQUIRE(run(folder, "softmax causal=1" + files + " --threads " + threads).exit_code == 0);
    if (first.empty()) first = folder.read("out.npy");
    CHECK(folder.read("out.npy") == first);
  }
}

TEST_CASE("attend_npy: the order of keys and options is free", "[attend_npy]") {
  const TemporaryFolder folder;
  Inputs().save_as<float>(folder);
  REQUIRE(run(folder, "softmax causal=1 window=5" + files).exit_code == 0);
  const std::string expected = folder.read("out.npy");
  REQUIRE(run(folder, "softmax --out other.npy window=5 --v v.npy --k k.npy causal=1 --q q.npy").exit_code ==
          0);
  CHECK(folder.read("other.npy") == expected);
}

TEST_CASE("attend_npy: --help prints to stdout, a call without arguments prints the same to stderr",
          "[attend_npy]") {
  const TemporaryFolder folder;
  const Outcome help = run(folder, "--help"), late = run(folder, "softmax --out --help"),
                none = run(folder, "");
  CHECK(help.exit_code == 0);
  CHECK(help.err == "");
  CHECK(help.out.substr(0, 24) == "usage: attend_npy VARIAN");
  CHECK(help.out.find("window=W") != std::string::npos);
  CHECK(late.exit_code == 0);
  CHECK(late.out == help.out);
  CHECK(none.exit_code == 2);
  CHECK(none.out == "");
  CHECK(none.err == help.out);
  CHECK(folder.names().empty());
}

namespace {

/// Checks for one sentence on stderr, exit code 2, and an unchanged folder.
void check_refused(const TemporaryFolder& folder, const std::string& words, const std::string& sentence,
                   const std::string& before = "") {
  CAPTURE(words);
  const auto names = folder.names();
  const Outcome outcome = run(folder, words, before);
  CHECK(outcome.exit_code == 2);
  CHECK(outcome.out == "");
  CHECK(outcome.err == "attend_npy: " + sentence + "\n");
  CHECK(folder.names() == names);
}

}  // namespace

TEST_CASE("attend_npy: a wrong command line prints one sentence and writes nothing", "[attend_npy][errors]") {
  const TemporaryFolder folder;
  Inputs().save_as<float>(folder);
  const std::string options =
      "--q, --k, --v, --out, --lse, --dtype, --threads, --beta, --memory-out, --norm-out, --layout, --dout, "
      "--dlse, --dq, --dk and --dv";
  check_refused(
      folder, "sofmax" + files,
      "unknown variant 'sofmax', the variants are: softmax, softmax_stream, landmark, landmark_stream, "
      "infini, hybrid_stream, dilated and dilated_stream");
  check_refused(
      folder, "causal=1 softmax" + files,
      "unknown variant 'causal=1', the variants are: softmax, softmax_stream, landmark, landmark_stream, "
      "infini, hybrid_stream, dilated and dilated_stream");
  check_refused(folder, "softmax casual=1" + files,
                "unknown key 'casual', the keys of softmax are causal, window, scale and softcap");
  check_refused(folder, "softmax causal=1 causal=1" + files, "the key causal is given twice");
  check_refused(folder, "softmax causal" + files,
                "'causal' is neither key=value nor one of the options " + options);
  check_refused(folder, "softmax =1" + files, "'=1' is neither key=value nor one of the options " + options);
  check_refused(folder, "softmax -q q.npy" + files,
                "'-q' is neither key=value nor one of the options " + options);
  check_refused(folder, "softmax --block 3" + files, "unknown option '--block', the options are " + options);
  check_refused(folder, "softmax --q=q.npy" + files,
                "unknown option '--q=q.npy', the options are " + options);
  check_refused(folder, "softmax --q q.npy" + files, "the option --q is given twice");
  check_refused(folder, "softmax" + files + " --lse", "the option --lse has no value");
  check_refused(folder, "softmax --lse" + files, "the option --lse has no value");
  check_refused(folder, "softmax --lse ''" + files, "the option --lse has no value");
  check_refused(folder, "softmax", "the option --q is missing");
  check_refused(folder, "softmax --q q.npy --k k.npy --v v.npy", "the option --out is missing");
  check_refused(folder, "softmax" + files + " --lse out.npy",
                "the options --out and --lse name the same file");
  check_refused(folder, "softmax" + files + " --lse ../$(basename $PWD)/./out.npy",
                "the options --out and --lse name the same file");
  check_refused(folder, "softmax" + files + " --dtype float32",
                "the option --dtype is 'float32', wanted f32, f64, bf16 or f16");
  check_refused(folder, "softmax" + files + " --layout bhdn",
                "the option --layout is 'bhdn', wanted bhnd or bnhd");
  for (const std::string threads : {"0", "-1", "2x", "1.5", "4097", "99999999999999999999"}) {
    check_refused(folder, "softmax" + files + " --threads " + threads,
                  "the option --threads is '" + threads + "', wanted an integer from 1 to 4096");
  }
}

TEST_CASE("attend_npy: an output that is an input under another name is refused, and the input is kept",
          "[attend_npy][errors]") {
  const TemporaryFolder folder;
  Inputs().save_as<float>(folder);
  save<float>(folder, "beta.npy", {1}, {0.5});
  namespace fs = std::filesystem;
  fs::create_symlink("q.npy", folder.file("symbolic.npy"));
  fs::create_hard_link(folder.file("k.npy"), folder.file("hard.npy"));
  fs::create_directory_symlink(".", folder.file("here"));
  const std::string q = folder.read("q.npy"), k = folder.read("k.npy"), v = folder.read("v.npy"),
                    beta = folder.read("beta.npy");
  const std::string in = " --q q.npy --k k.npy --v v.npy";
  const auto check = [&](const std::string& words, const std::string& input, const std::string& output) {
    check_refused(folder, words,
                  "the options " + input + " and " + output +
                      " name the same file, and an output must not replace an input");
    CHECK(folder.read("q.npy") == q);
    CHECK(folder.read("k.npy") == k);
    CHECK(folder.read("v.npy") == v);
    CHECK(folder.read("beta.npy") == beta);
  };
  check("softmax" + in + " --out q.npy", "--q", "--out");
  check("softmax" + in + " --out ./k.npy", "--k", "--out");
  check("softmax" + in + " --out symbolic.npy", "--q", "--out");
  check("softmax" + in + " --out hard.npy", "--k", "--out");
  check("softmax" + in + " --out here/v.npy", "--v", "--out");
  check("softmax --q symbolic.npy --k k.npy --v v.npy --out q.npy", "--q", "--out");
  check("softmax" + in + " --out out.npy --lse v.npy", "--v", "--lse");
  const std::string infini = "infini segment=8" + in + " --beta beta.npy --out out.npy";
  check(infini + " --memory-out ./beta.npy", "--beta", "--memory-out");
  check(infini + " --norm-out hard.npy", "--k", "--norm-out");
  check_refused(folder, infini + " --norm-out m.npy --memory-out m.npy",
                "the options --memory-out and --norm-out name the same file");

  // Two outputs that already exist as two names of one file.
  folder.write("out.npy", "from an earlier run");
  fs::create_hard_link(folder.file("out.npy"), folder.file("lse.npy"));
  check_refused(folder, "softmax" + files + " --lse lse.npy",
                "the options --out and --lse name the same file");
  CHECK(folder.read("out.npy") == "from an earlier run");
}

TEST_CASE("attend_npy: with --layout bnhd tensors are [B, N, H, d], and the result is the same",
          "[attend_npy]") {
  const TemporaryFolder folder;
  const Inputs in;
  const auto turned = [](const Values& x) {
    const auto [B, H, N, d] = std::array{x.shape[0], x.shape[1], x.shape[2], x.shape[3]};
    Values to{{B, N, H, d}, {}};
    for (Index b = 0; b < B; ++b)
      for (Index i = 0; i < N; ++i)
        for (Index h = 0; h < H; ++h)
          to.values.insert(to.values.end(), x.view().row(b, h, i), x.view().row(b, h, i) + d);
    return to;
  };
  const auto check = [&](const Inputs& straight, std::size_t rank, const std::string& variant) {
    CAPTURE(variant, rank);
    // The last `rank` dimensions; with one head both layouts are [N, d].
    const auto file_shape = [&](const std::vector<Index>& shape) {
      if (rank == 2) return std::vector<Index>{shape[1] * shape[2], shape[3]};
      return std::vector<Index>(shape.end() - static_cast<std::ptrdiff_t>(rank), shape.end());
    };
    const auto saved = [&](const std::string& name, const Values& x) {
      save<float>(folder, name, file_shape(x.shape), x.values);
    };
    const bool has_lse = variant.substr(0, 6) != "infini" && variant.substr(0, 6) != "hybrid";
    const std::string more = has_lse                            ? " --lse lse.npy"
                             : variant.substr(0, 6) == "infini" ? " --memory-out lse.npy"
                                                                : "";
    const std::string outputs = " --out out.npy" + more;
    save<float>(folder, "lse.npy", {1}, {0.0});
    saved("q.npy", straight.q), saved("k.npy", straight.k), saved("v.npy", straight.v);
    REQUIRE(run(folder, variant + " --q q.npy --k k.npy --v v.npy" + outputs).exit_code == 0);
    const npy::Array out = npy::read(folder.file("out.npy")), lse = npy::read(folder.file("lse.npy"));
    saved("q.npy", turned(straight.q)), saved("k.npy", turned(straight.k)),
        saved("v.npy", turned(straight.v));
    const Outcome outcome = run(folder, variant + " --layout bnhd --q q.npy --k k.npy --v v.npy" + outputs);
    REQUIRE(outcome.err == "");
    Values full{{straight.q.shape[0], straight.q.shape[1], straight.q.shape[2], straight.v.shape[3]},
                values_of(out)};
    const npy::Array out_turned = npy::read(folder.file("out.npy")),
                     lse_turned = npy::read(folder.file("lse.npy"));
    full = turned(full);
    CHECK(out_turned.shape == file_shape(full.shape));
    CHECK(values_of(out_turned) == full.values);
    CHECK(lse_turned.shape == lse.shape);
    CHECK(values_of(lse_turned) == values_of(lse));
  };
  const Inputs of_one{random_values({1, 6, 37, 24}, 1), random_values({1, 2, 37, 24}, 2),
                      random_values({1, 2, 37, 5}, 3)};
  check(in, 4, "softmax causal=1");
  check(in, 4, "dilated segments=8,16 dilations=1,2");
  check(in, 4, "landmark block=8");
  for (const std::string variant :
       {"softmax_stream chunks=20,17", "landmark_stream block=8 chunks=20,17", "infini segment=8",
        "hybrid_stream block=8", "dilated_stream segments=8"}) {
    check(of_one, 4, variant);
    check(of_one, 3, variant);
  }
  check({random_values({1, 1, 9, 8}, 1), random_values({1, 1, 9, 8}, 2), random_values({1, 1, 9, 8}, 3)}, 2,
        "softmax");
  save<float>(folder, "q.npy", {4}, {1, 2, 3, 4});
  check_refused(folder, "softmax --layout bnhd" + files,
                "q.npy: has the shape (4,), wanted 2 to 4 dimensions: [N, d], [N, H, d] or [B, N, H, d]");
}

TEST_CASE("attend_npy: stderr has a line with the shapes, and a warning if queries see no key",
          "[attend_npy]") {
  const TemporaryFolder folder;
  const auto notes = [&](const std::vector<Index>& q, const std::vector<Index>& k,
                         const std::vector<Index>& v, const std::string& variant) {
    for (const auto& [name, shape] : {std::pair{"q.npy", q}, {"k.npy", k}, {"v.npy", v}})
      save<float>(folder, name, shape,
                  std::vector<double>(static_cast<std::size_t>(*npy::value_count(shape)), 1.0));
    const Outcome outcome = run(folder, variant + files);
    CHECK(outcome.exit_code == 0);
    CHECK(outcome.err == "");
    CHECK(outcome.out == "");
    return outcome.notes;
  };
  const std::string read = "attend_npy: read ", warning = "attend_npy: warning: ";
  CHECK(notes({1, 8, 12, 64}, {1, 2, 12, 64}, {1, 2, 12, 64}, "softmax causal=1") ==
        read + "8 heads of 12 queries on 2 KV heads of 12 keys, head_dim 64\n");
  CHECK(notes({2, 1, 1, 8}, {2, 1, 1, 8}, {2, 1, 1, 3}, "softmax") ==
        read + "2 batch rows of 1 head of 1 query on 1 KV head of 1 key, head_dim 8, value_dim 3\n");
  CHECK(notes({7, 8}, {7, 8}, {7, 8}, "infini segment=4") ==
        read + "1 head of 7 queries on 1 KV head of 7 keys, head_dim 8\n");
  // A dump [B, N, H, d] that is read as [B, H, N, d].
  const std::vector<Index> q{1, 512, 8, 16}, k{1, 512, 2, 16};
  CHECK(notes(q, k, k, "softmax causal=1") ==
        read + "512 heads of 8 queries on 512 KV heads of 2 keys, head_dim 16\n" + warning +
            "3072 of 4096 queries see no key, and the output of each is 0: with 8 queries on 2 keys the last "
            "query "
            "is at the last key\n");
  CHECK(notes(q, k, k, "softmax causal=1 --layout bnhd") ==
        read + "8 heads of 512 queries on 2 KV heads of 512 keys, head_dim 16\n");
  CHECK(notes(q, k, k, "landmark block=2 causal=1").find("3072 of 4096 queries see no key") !=
        std::string::npos);
  CHECK(notes({1, 2, 1, 4}, {1, 1, 0, 4}, {1, 1, 0, 4}, "softmax") ==
        read + "2 heads of 1 query on 1 KV head of 0 keys, head_dim 4\n" + warning +
            "2 of 2 queries see no key, and the output of each is 0\n");
  // An error prints only one sentence.
  save<float>(folder, "k.npy", {1, 3, 2, 16}, std::vector<double>(96, 1.0));
  CHECK(run(folder, "softmax" + files).notes == "");
}

TEST_CASE("attend_npy: a wrong value of a key prints one sentence and writes nothing",
          "[attend_npy][errors]") {
  const TemporaryFolder folder;
  Inputs().save_as<float>(folder);
  const auto check = [&](const std::string& key, const std::string& wanted,
                         const std::vector<std::string>& values) {
    for (const std::string& value : values) {
      check_refused(folder, "softmax '" + key + "=" + value + "'" + files,
                    "the key " + key + " is '" + value + "', wanted " + wanted);
    }
  };
  check("causal", "0 or 1", {"", "2", "true", "01", " 1", "1 "});
  check("window", "an integer from 1 to 2^63 - 1",
        {"", "0", "-4", "+4", "4.0", "4k", " 4", "0x4", "9223372036854775808"});
  check("scale", "a finite number other than 0",
        {"", "0", "-0.0", "inf", "nan", "1e999", "1,5", "0.5f", "+1", "x=1"});
  check("softcap", "a finite number above 0", {"", "0", "-1", "inf", "nan", "1e39", "1e-60", "50 "});
}

TEST_CASE("attend_npy dilated: a wrong value of a key prints one sentence", "[attend_npy][errors]") {
  const TemporaryFolder folder;
  Inputs().save_as<float>(folder);
  check_refused(folder, "dilated" + files, "the key segments is missing");
  check_refused(folder, "dilated segments=8,16 dilations=1" + files,
                "the key dilations has 1 numbers, wanted 2 as the key segments has");
  for (const std::string list :
       {"", ",", "8,", "8,,16", "8;16", "0", "8,-1", "8, 16", "99999999999999999999"}) {
    check_refused(
        folder, "dilated 'segments=" + list + "'" + files,
        "the key segments is '" + list + "', wanted integers from 1 to 2^63 - 1 with commas between");
  }
  check_refused(folder, "dilated segments=8 phase=mod" + files,
                "the key phase is 'mod', wanted modulo or blocked");
  check_refused(folder, "dilated segments=8 overlap=" + files,
                "the key overlap is '', wanted multiset or set");
}

TEST_CASE("attend_npy: bad files are refused with one sentence, and nothing is written",
          "[attend_npy][errors]") {
  const TemporaryFolder folder;
  const Inputs in;
  in.save_as<float>(folder);
  check_refused(folder, "softmax --q none.npy --k k.npy --v v.npy --out out.npy",
                "none.npy: cannot be read: No such file or directory");
  check_refused(folder, "softmax --q . --k k.npy --v v.npy --out out.npy", ".: is not a regular file");
  folder.write("short.npy", folder.read("v.npy").substr(0, 1000));
  check_refused(folder, "softmax --q q.npy --k k.npy --v short.npy --out out.npy",
                "short.npy: holds 872 bytes of values, wanted 2960 for the shape (2, 2, 37, 5)");
  save<float>(folder, "flat.npy", {4}, {1, 2, 3, 4});
  check_refused(folder, "softmax --q flat.npy --k k.npy --v v.npy --out out.npy",
                "flat.npy: has the shape (4,), wanted 2 to 4 dimensions: [N, d], [H, N, d] or [B, H, N, d]");
  save<float>(folder, "deep.npy", {1, 1, 1, 1, 1}, {1});
  check_refused(
      folder, "softmax --q deep.npy --k k.npy --v v.npy --out out.npy",
      "deep.npy: has the shape (1, 1, 1, 1, 1), wanted 2 to 4 dimensions: [N, d], [H, N, d] or [B, H, N, d]");
}

TEST_CASE("attend_npy: shapes that disagree are refused, and nothing is written", "[attend_npy][errors]") {
  const TemporaryFolder folder;
  const Inputs in;
  const auto check = [&](const std::string& name, const std::vector<Index>& shape) {
    in.save_as<float>(folder);
    save<float>(folder, name, shape,
                std::vector<double>(static_cast<std::size_t>(*npy::value_count(shape)), 1.0));
    const auto names = folder.names();
    const Outcome outcome = run(folder, "softmax" + files + " --lse lse.npy");
    CAPTURE(name, outcome.err);
    CHECK(outcome.exit_code == 2);
    CHECK(outcome.err.substr(0, 12) == "attend_npy: ");
    CHECK(outcome.err.find("softmax_attention: ") != std::string::npos);
    CHECK(outcome.err.find('\n') == outcome.err.size() - 1);
    CHECK(folder.names() == names);
  };
  check("q.npy", {1, 6, 19, 24});  // wrong batch
  check("q.npy", {2, 5, 19, 24});  // heads is not a multiple of kv_heads
  check("k.npy", {2, 2, 37, 23});  // wrong head_dim
  check("v.npy", {2, 2, 36, 5});   // wrong kv_len
  check("v.npy", {2, 1, 37, 5});   // wrong kv_heads
  check("v.npy", {37, 5});         // one head of one batch row
}

TEST_CASE("attend_npy: a failure does not change the outputs of an earlier run", "[attend_npy][errors]") {
  const TemporaryFolder folder;
  Inputs().save_as<float>(folder);
  folder.write("out.npy", "from an earlier run");
  folder.write("lse.npy", "this too");
  std::filesystem::create_directory(folder.file("folder"));

  check_refused(folder, "softmax" + files + " --lse folder",
                "folder: is there already and is not a regular file");
  check_refused(folder, "softmax" + files + " --lse none/lse.npy",
                "none/lse.npy: the folder to write it in does not exist");
  // A disk that is full after 32 KiB (64 KiB with some shells) of the 80 KB of out.npy. Some OpenMP runtimes write a
  // smaller file of their own, which must still fit.
  save<float>(folder, "long.npy", {5000, 4}, std::vector<double>(20000, 1.0));
  check_refused(folder, "softmax window=1 --q long.npy --k long.npy --v long.npy --out out.npy --lse lse.npy",
                "out.npy: cannot be written: File too large", "trap '' XFSZ && ulimit -f 64 && ");
  CHECK(folder.read("out.npy") == "from an earlier run");
  CHECK(folder.read("lse.npy") == "this too");

  REQUIRE(run(folder, "softmax" + files + " --lse lse.npy").exit_code == 0);
  CHECK(npy::read(folder.file("out.npy")).shape == std::vector<Index>{2, 6, 19, 5});
  CHECK(npy::read(folder.file("lse.npy")).shape == std::vector<Index>{2, 6, 19});
  CHECK(folder.names() ==
        std::set<std::string>{"q.npy", "k.npy", "v.npy", "out.npy", "lse.npy", "long.npy", "folder"});
}

TEST_CASE("attend_npy: an output that is too large for memory is refused", "[attend_npy][errors]") {
  const TemporaryFolder folder;
  // Files without values may have any size: out would have 2^59 values, or more bytes than can be counted.
  save<float>(folder, "q.npy", {2, 2, 2, 1}, std::vector<double>(8, 1.0));
  save<float>(folder, "k.npy", {2, 2, 0, 1}, {});
  save<float>(folder, "v.npy", {2, 2, 0, Index(1) << 57}, {});
  check_refused(folder, "softmax" + files,
                "out.npy: would have the shape (2, 2, 2, 144115188075855872), too large for any memory");
#if !defined(LONGSPAN_TEST_ADDRESS_SANITIZER)  // a sanitizer would end the program
  save<float>(folder, "v.npy", {2, 2, 0, Index(1) << 56}, {});
  check_refused(folder, "softmax" + files, "not enough memory for these tensors");
#endif
}
