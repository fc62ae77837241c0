#include "longspan/reference/infini_attention.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "longspan/gates.hpp"
#include "longspan/infini_attention.hpp"
#include "support/catch.hpp"
#include "support/tensor.hpp"

namespace {

using longspan::elu_plus_one;
using longspan::EmptyMemory;
using longspan::Index;
using longspan::InfiniRule;
using longspan::MatrixView;
using longspan::reference::InfiniMemory;
using Row = std::vector<double>;
namespace reference = longspan::reference;

/// Writes one segment whose keys have two columns and whose values have one.
void write(InfiniMemory& memory, const std::vector<Row>& keys, const Row& values, InfiniRule rule) {
  Row k;
  for (const Row& key : keys) k.insert(k.end(), key.begin(), key.end());
  const auto rows = static_cast<Index>(keys.size());
  reference::write(memory, MatrixView<const double>{k.data(), rows, 2, 2},
                   MatrixView<const double>{values.data(), rows, 1, 1}, rule, elu_plus_one{});
}
double read_at(const InfiniMemory& memory, const Row& q) {
  return reference::read(memory, reference::features(q.data(), 2, elu_plus_one{}))[0];
}

}  // namespace

TEST_CASE("reference infini_attention: two keys, computed by hand", "[golden][infini]") {
  InfiniMemory memory(2, 1);
  CHECK(read_at(memory, {0, 1}) == 0);
  write(memory, {{0, 0}, {1, 0}}, {2, 5}, InfiniRule::linear);
  CHECK(memory.m == Row{12, 7});
  CHECK(memory.z == Row{3, 2});
  CHECK(std::abs(read_at(memory, {0, 1}) - 26.0 / 7) < 1e-15);
  CHECK(read_at(memory, {1, 0}) == 31.0 / 8);
}

TEST_CASE("reference infini_attention: the two rules differ from the second segment on", "[golden][infini]") {
  InfiniMemory linear(2, 1), delta(2, 1);
  for (const auto& [memory, rule] : {std::pair{&linear, InfiniRule::linear}, {&delta, InfiniRule::delta}}) {
    write(*memory, {{0, 0}, {1, 0}}, {2, 5}, rule);
    write(*memory, {{1, 0}}, {5}, rule);
    CHECK(memory->z == Row{5, 3});
  }
  CHECK(linear.m == Row{22, 12});
  CHECK(delta.m == Row{14.25, 8.125});
}

TEST_CASE("reference infini_attention: the same pair repeated", "[golden][infini]") {
  InfiniMemory linear(2, 1), delta(2, 1);
  const Row of_delta[] = {{10, 5}, {10, 5}, {15, 7.5}};
  const double read_of_delta[] = {5, 2.5, 2.5};
  for (int n = 0; n < 3; ++n) {
    write(linear, {{1, 0}}, {5}, InfiniRule::linear);
    write(delta, {{1, 0}}, {5}, InfiniRule::delta);
    CHECK(read_at(linear, {1, 0}) == 5);
    CHECK(delta.m == of_delta[n]);
    CHECK(read_at(delta, {1, 0}) == read_of_delta[n]);
  }
  InfiniMemory together(2, 1);
  write(together, {{1, 0}, {1, 0}}, {5, 5}, InfiniRule::delta);
  CHECK(together.m == Row{20, 10});
  CHECK(together.z == Row{4, 2});
}

TEST_CASE("reference infini_attention: gate and first segment", "[golden][infini]") {
  // Segments of 2; the first query of the second segment reads 26/7 and sees only its own value 1.
  const Row q{0, 0, 0, 0, 0, 1}, k{0, 0, 1, 0, 0, 0}, v{2, 5, 1}, local{2, 3.5, 1}, beta{std::log(3.0)};
  for (const EmptyMemory empty_memory : {EmptyMemory::gate, EmptyMemory::bypass}) {
    Row out(3);
    reference::infini_head(
        MatrixView<const double>{q.data(), 3, 2, 2}, MatrixView<const double>{k.data(), 3, 2, 2},
        MatrixView<const double>{v.data(), 3, 1, 1}, MatrixView<const double>{local.data(), 3, 1, 1}, beta, 2,
        InfiniRule::linear, empty_memory, elu_plus_one{}, MatrixView<double>{out.data(), 3, 1, 1});
    CHECK(std::abs(out[0] - (empty_memory == EmptyMemory::gate ? 0.5 : 2)) < 1e-15);
    CHECK(std::abs(out[2] - (0.75 * 26 / 7 + 0.25)) < 1e-15);
  }
}

TEST_CASE("reference infini_attention: a functor is its heads and segments", "[infini]") {
  // The case above, twice: as two heads over one KV head, and as the second batch row, which has one row only.
  using test::Tensor;
  Tensor<double> q(2, 2, 3, 2), k(2, 1, 3, 2), v(2, 1, 3, 1), out(2, 2, 3, 1, 9.0);
  for (Index b = 0; b < 2; ++b) {
    const Row keys{0, 0, 1, 0, 0, 0}, values{2, 5, 1};
    std::copy(keys.begin(), keys.end(), k.row(b, 0, 0));
    std::copy(values.begin(), values.end(), v.row(b, 0, 0));
    for (Index h = 0; h < 2; ++h) q.row(b, h, 2)[1] = 1;
  }
  longspan::infini_attention attend;
  attend.segment = 2;
  const std::vector<float> beta{std::log(3.0f), -std::log(3.0f)};
  attend.beta = longspan::per_head_gate(beta);
  const std::vector<Index> lengths{3, 1};
  attend.lengths = lengths;
  reference::exact{attend}(q.view(), k.view(), v.view(), out.view());
  // Local attention of row 1 is the mean of 2 and 5, its memory is empty.
  const double wanted[]{0.5, 0.25 * 3.5, 0.75 * 26 / 7 + 0.25, 1.5, 0.75 * 3.5, 0.25 * 26 / 7 + 0.75};
  for (Index h = 0; h < 2; ++h) {
    for (Index i = 0; i < 3; ++i) {
      CHECK(std::abs(out.row(0, h, i)[0] - wanted[3 * h + i]) < 1e-7);
      CHECK(std::abs(out.row(1, h, i)[0] - (i == 0 ? wanted[3 * h] : 0)) < 1e-7);
    }
  }
}
