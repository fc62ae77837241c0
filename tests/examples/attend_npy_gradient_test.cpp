// attend_npy with --dout: the gradients of softmax compared with the reference, and errors.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attend_npy_program.hpp"
#include "longspan/reference/gradient/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"
#include "temporary_folder.hpp"

namespace {

using namespace test;

const std::string files = "softmax --q q.npy --k k.npy --v v.npy --out out.npy --dout dout.npy";
const std::string gradients = " --dq dq.npy --dk dk.npy --dv dv.npy";

/// The tensors of a call, and its gradients by the reference.
struct Example {
  Tensor<float> q{2, 4, 9, 8}, k{2, 2, 13, 8}, v{2, 2, 13, 5}, dout{2, 4, 9, 5};
  Rows<float> dlse{2, 4, 9};
  Tensor<double> dq{2, 4, 9, 8}, dk{2, 2, 13, 8}, dv{2, 2, 13, 5};

  Example() {
    Random random(1);
    for (auto* x : {&q, &k, &v, &dout}) fill_normal(*x, random);
    for (float& x : dlse.values) x = static_cast<float>(random.normal());
  }
  template <class Attend>
  void differentiate(const Attend& attend) {
    longspan::reference::exact{gradient(attend)}(q.view(), k.view(), v.view(), dout.view(), dlse.view(),
                                                 dq.view(), dk.view(), dv.view());
  }
};

/// The shape of a tensor, and its values in that order of dimensions.
template <class T>
std::vector<Index> shape_of(const Tensor<T>& x, bool rows_first = false) {
  if (rows_first) return {x.batch, x.rows, x.heads, x.cols};
  return {x.batch, x.heads, x.rows, x.cols};
}
template <class T>
std::vector<T> values_of(const Tensor<T>& x, bool rows_first = false) {
  if (!rows_first) return x.values;
  std::vector<T> values;
  for (Index b = 0; b < x.batch; ++b) {
    for (Index i = 0; i < x.rows; ++i) {
      for (Index h = 0; h < x.heads; ++h)
        values.insert(values.end(), x.row(b, h, i), x.row(b, h, i) + x.cols);
    }
  }
  return values;
}

void save_inputs(const TemporaryFolder& folder, const Example& of, bool rows_first = false) {
  const auto save_as = [&](const char* name, const Tensor<float>& x) {
    save<float>(folder, name, shape_of(x, rows_first), values_of(x, rows_first));
  };
  save_as("q.npy", of.q);
  save_as("k.npy", of.k);
  save_as("v.npy", of.v);
  save_as("dout.npy", of.dout);
  save<float>(folder, "dlse.npy", {2, 4, 9}, of.dlse.values);
}

bool is_near(const TemporaryFolder& folder, const char* name, const Tensor<double>& wanted,
             bool rows_first = false) {
  const std::vector<float> got = loaded(folder, name, shape_of(wanted, rows_first));
  const std::vector<double> exact = values_of(wanted, rows_first);
  for (std::size_t n = 0; n < exact.size(); ++n) {
    if (!(std::abs(double(got[n]) - exact[n]) <= 1e-5)) return false;
  }
  return !exact.empty();
}

}  // namespace

TEST_CASE("attend_npy: gradients of softmax agree with the reference") {
  Example example;
  for (const bool rows_first : {false, true}) {
    const TemporaryFolder folder;
    save_inputs(folder, example, rows_first);
    const std::string layout = rows_first ? " --layout bnhd" : "";
    const Outcome outcome = run(folder, files + gradients + " --dlse dlse.npy causal=1 softcap=2" + layout);
    CHECK(outcome.err.empty());
    REQUIRE(outcome.exit_code == 0);
    example.differentiate(longspan::softmax_attention{longspan::causal{}, longspan::softcap{2}});
    CHECK(is_near(folder, "dq.npy", example.dq, rows_first));
    CHECK(is_near(folder, "dk.npy", example.dk, rows_first));
    CHECK(is_near(folder, "dv.npy", example.dv, rows_first));
  }
}

TEST_CASE("attend_npy: each gradient is optional, and so is dlse") {
  Example example;
  const TemporaryFolder folder;
  save_inputs(folder, example);
  REQUIRE(run(folder, files + " --dk dk.npy scale=0.5").exit_code == 0);
  std::fill(example.dlse.values.begin(), example.dlse.values.end(), 0.0f);
  longspan::softmax_attention attend;
  attend.scale = 0.5;
  example.differentiate(attend);
  CHECK(is_near(folder, "dk.npy", example.dk));
  const auto names = folder.names();
  CHECK(std::find(names.begin(), names.end(), "dq.npy") == names.end());
  CHECK(run(folder, files).exit_code == 0);
}

TEST_CASE("attend_npy: gradients of files with two dimensions") {
  Random random(2);
  const TemporaryFolder folder;
  Tensor<float> x(1, 1, 5, 4);
  fill_normal(x, random);
  for (const char* name : {"q.npy", "k.npy", "v.npy", "dout.npy"})
    save<float>(folder, name, {5, 4}, x.values);
  REQUIRE(run(folder, files + gradients).exit_code == 0);
  CHECK(loaded(folder, "dq.npy", {5, 4}).size() == 20);
  CHECK(loaded(folder, "dk.npy", {5, 4}).size() == 20);
}

TEST_CASE("attend_npy: gradients that cannot be computed are refused") {
  const Example example;
  const TemporaryFolder folder;
  save_inputs(folder, example);
  const auto check_refused = [&](const std::string& words, const std::string& part) {
    const auto names = folder.names();
    const Outcome outcome = run(folder, words);
    CAPTURE(words, outcome.err);
    CHECK(outcome.exit_code == 2);
    CHECK(outcome.err.find(part) != std::string::npos);
    CHECK(folder.names() == names);
  };
  const std::string no_dout = "softmax --q q.npy --k k.npy --v v.npy --out out.npy";
  check_refused(no_dout + " --dq dq.npy", "the options --dlse, --dq, --dk and --dv need --dout");
  check_refused(no_dout + " --dlse dlse.npy", "the options --dlse, --dq, --dk and --dv need --dout");
  check_refused("landmark block=4 --q q.npy --k k.npy --v v.npy --out out.npy --dout dout.npy",
                "the options --dout, --dlse, --dq, --dk and --dv are for softmax");
  check_refused(no_dout + " --dout q.npy --dq dq.npy", "dout is [2, 4, 9, 8], wanted [2, 4, 9, 5]");
  check_refused(files + " --dlse dout.npy --dq dq.npy", "has the shape (2, 4, 9, 5), wanted (2, 4, 9)");
  check_refused(files + " --dq dout.npy", "the options --dout and --dq name the same file");
  check_refused(files + " --dq dq.npy --dk dq.npy", "the options --dq and --dk name the same file");
}
