#include "examples/attend_npy/npy.hpp"

#include <sys/stat.h>

#include <cstdint>
#include <cstring>
#include <random>

#include "support/catch.hpp"
#include "temporary_folder.hpp"

namespace {

using longspan::Index;

/// The bytes of a file with this text as its header.
std::string npy_bytes(const std::string& header, std::size_t value_bytes, int major = 1) {
  std::string bytes = "\x93NUMPY";
  bytes += static_cast<char>(major);
  bytes += '\0';
  for (int i = 0; i < (major == 1 ? 2 : 4); ++i) bytes += static_cast<char>(header.size() >> 8 * i & 0xff);
  return bytes + header + std::string(value_bytes, '\0');
}

std::string dictionary(const std::string& shape) {
  return "{'descr': '<f4', 'fortran_order': False, 'shape': " + shape + ", }\n";
}

/// The reason why the bytes are refused, without the path; "" if they are read.
std::string refusal(const TemporaryFolder& folder, const std::string& bytes) {
  folder.write("x.npy", bytes);
  try {
    npy::read(folder.file("x.npy"));
    return "";
  } catch (const longspan::FileError& error) {
    const std::string text = error.what(), start = folder.file("x.npy") + ": ";
    REQUIRE(text.substr(0, start.size()) == start);
    return text.substr(start.size());
  }
}

struct Collected {
  std::string bytes;
  void write(const void* from, std::size_t count) { bytes.append(static_cast<const char*>(from), count); }
};

template <class T>
std::string written(const std::vector<Index>& shape, const std::vector<T>& values) {
  Collected file;
  npy::write(file, shape, std::span<const T>(values));
  return file.bytes;
}

template <class T>
std::vector<T> distinct_values(std::size_t count) {
  std::vector<T> values(count);
  for (std::size_t n = 0; n < count; ++n) values[n] = static_cast<T>(1) / static_cast<T>(n + 3);
  return values;
}

/// Checks that an array has as many values as its shape.
void check_consistent(const npy::Array& array) {
  const auto count = npy::value_count(array.shape);
  REQUIRE(count.has_value());
  const auto held = std::visit([](const auto& values) { return values.size(); }, array.values);
  REQUIRE(held == static_cast<std::size_t>(*count));
}

}  // namespace

TEMPLATE_TEST_CASE("npy: reads the bits that were written", "[npy]", float, double) {
  const TemporaryFolder folder;
  const std::vector<std::vector<Index>> shapes{{},  {1},    {7},       {3, 5}, {2, 3, 4},       {2, 1, 3, 5},
                                               {0}, {0, 3}, {4, 0, 2}, {1, 1}, {2, 2, 2, 2, 2}, {1000}};
  for (const auto& shape : shapes) {
    CAPTURE(npy::shape_text(shape));
    const auto values = distinct_values<TestType>(static_cast<std::size_t>(*npy::value_count(shape)));
    folder.write("x.npy", written(shape, values));
    const npy::Array array = npy::read(folder.file("x.npy"));
    CHECK(array.shape == shape);
    REQUIRE(std::holds_alternative<std::vector<TestType>>(array.values));
    CHECK(std::get<std::vector<TestType>>(array.values) == values);
  }
}

TEST_CASE("npy: NaN, infinities and zeros keep their bits", "[npy]") {
  const TemporaryFolder folder;
  const std::vector<std::uint32_t> bits{0x7fc00001u, 0xffc00000u, 0x7f800000u, 0xff800000u, 0x80000000u, 1u};
  std::vector<float> values(bits.size());
  std::memcpy(values.data(), bits.data(), bits.size() * sizeof(float));
  folder.write("x.npy", written({6}, values));
  const npy::Array array = npy::read(folder.file("x.npy"));
  CHECK(std::memcmp(std::get<0>(array.values).data(), bits.data(), bits.size() * sizeof(float)) == 0);
}

TEST_CASE("npy: the header is the text that numpy writes, padded to 64 bytes", "[npy]") {
  CHECK(npy::shape_text(std::vector<Index>{}) == "()");
  CHECK(npy::shape_text(std::vector<Index>{3}) == "(3,)");
  CHECK(npy::shape_text(std::vector<Index>{3, 4, 5}) == "(3, 4, 5)");

  const std::string text = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
  const std::string start("\x93NUMPY\x01\x00\x76\x00", 10);
  CHECK(npy::header_bytes<float>(std::vector<Index>{2, 3}) ==
        start + text + std::string(128 - 10 - 1 - text.size(), ' ') + '\n');
  CHECK(npy::header_bytes<double>(std::vector<Index>{3}).find("'descr': '<f8'") != std::string::npos);
  std::vector<Index> shape;
  for (int rank = 0; rank <= 32; ++rank, shape.push_back(std::numeric_limits<Index>::max())) {
    CHECK(npy::header_bytes<float>(shape).size() % 64 == 0);
  }
}

TEST_CASE("npy: reads the versions, key orders, quotes and spaces of other writers", "[npy]") {
  const TemporaryFolder folder;
  const auto shape_of = [&](const std::string& bytes) {
    folder.write("x.npy", bytes);
    return npy::read(folder.file("x.npy")).shape;
  };
  const int version = GENERATE(1, 2, 3);
  CHECK(shape_of(npy_bytes(dictionary("(2, 3)"), 24, version)) == std::vector<Index>{2, 3});
  CHECK(shape_of(npy_bytes("{'shape': (2,), 'fortran_order': False, 'descr': '<f8'}", 16, version)) ==
        std::vector<Index>{2});
  CHECK(shape_of(npy_bytes("{\"shape\":(2,3,),\"descr\":\"<f4\",\"fortran_order\":False}", 24, version)) ==
        std::vector<Index>{2, 3});
  CHECK(shape_of(npy_bytes(" { 'shape' :\t( 2 , 3 ) ,\n'descr': '<f4' , 'fortran_order' : False , } \r\n", 24,
                           version)) == std::vector<Index>{2, 3});
  CHECK(shape_of(npy_bytes(dictionary("()"), 4, version)).empty());
  CHECK(shape_of(npy_bytes(dictionary("(0, 3)"), 0, version)) == std::vector<Index>{0, 3});
}

TEST_CASE("npy: each kind of bad file has its own error", "[npy][errors]") {
  const TemporaryFolder folder;
  const auto refused_dtype = [&](const std::string& descr) {
    return refusal(folder,
                   npy_bytes("{'descr': " + descr + ", 'fortran_order': False, 'shape': (2,), }\n", 16));
  };
  const std::string wanted_dtype = ", wanted '<f4' (float32) or '<f8' (float64)";
  CHECK(refusal(folder, "") == "is not a .npy file: it has less than 10 bytes");
  CHECK(refusal(folder, "PK\x03\x04 and some more") ==
        "is not a .npy file: it does not start with the six bytes \\x93NUMPY");
  CHECK(refusal(folder, npy_bytes(dictionary("(2,)"), 8, 4)) ==
        "has .npy version 4.0, wanted 1.0, 2.0 or 3.0");
  CHECK(refusal(folder, npy_bytes(dictionary("(2,)"), 8, 0)) ==
        "has .npy version 0.0, wanted 1.0, 2.0 or 3.0");

  CHECK(refused_dtype("'>f4'") == "has the dtype '>f4', which is big-endian" + wanted_dtype);
  CHECK(refused_dtype("'>f8'") == "has the dtype '>f8', which is big-endian" + wanted_dtype);
  for (const char* dtype : {"<f2", "<i4", "<i8", "|b1", "|u1", "<c8", "|O", "|V2", "<U3", "f4", ""}) {
    CHECK(refused_dtype("'" + std::string(dtype) + "'") ==
          "has the dtype '" + std::string(dtype) + "'" + wanted_dtype);
  }
  CHECK(refused_dtype("'\x1b[2J" + std::string(40, 'x') + "'") ==
        "has the dtype '?[2J" + std::string(28, 'x') + "...'" + wanted_dtype);
  CHECK(refused_dtype("[('x', '<f4')]") == "its dtype is a record, wanted float32 or float64");
  CHECK(refusal(folder, npy_bytes("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }", 24)) ==
        "is in Fortran order, wanted C order: save numpy.ascontiguousarray(x)");
}

TEST_CASE("npy: shapes that do not fit the file are refused before memory is allocated", "[npy][errors]") {
  const TemporaryFolder folder;
  const auto refused_shape = [&](const std::string& shape, std::size_t bytes = 24) {
    return refusal(folder, npy_bytes(dictionary(shape), bytes));
  };
  CHECK(refused_shape("(2, 3)", 23) == "holds 23 bytes of values, wanted 24 for the shape (2, 3)");
  CHECK(refused_shape("(2, 3)", 25) == "holds 25 bytes of values, wanted 24 for the shape (2, 3)");
  CHECK(refused_shape("(0, 3)", 1) == "holds 1 bytes of values, wanted 0 for the shape (0, 3)");
  CHECK(refused_shape("(-2, -3)") == "its shape has a negative dimension");
  // 2^60 - 1 is the largest number of doubles whose bytes can be counted, and 2^63 - 1 the largest number.
  CHECK(refused_shape("(1152921504606846975,)") ==
        "holds 24 bytes of values, wanted 4611686018427387900 for the shape (1152921504606846975,)");
  CHECK(refused_shape("(1152921504606846976,)") ==
        "has the shape (1152921504606846976,), which is too large for any memory");
  CHECK(refused_shape("(9223372036854775807,)") ==
        "has the shape (9223372036854775807,), which is too large for any memory");
  CHECK(refused_shape("(9223372036854775808,)") == "its shape has a dimension above 2^63 - 1");
  CHECK(refused_shape("(4294967296, 4294967296)") ==
        "has the shape (4294967296, 4294967296), which is too large for any memory");
  CHECK(refused_shape("(4294967296, 0, 4294967296)", 0) ==
        "has the shape (4294967296, 0, 4294967296), which is too large for any memory");
  std::string deep = "(";
  for (int n = 0; n < 33; ++n) deep += "1, ";
  CHECK(refused_shape(deep + ")", 4) == "its shape has more than 32 dimensions");

  std::string long_header = npy_bytes(std::string(65537, ' '), 0, 2);
  CHECK(refusal(folder, long_header) == "names a header of 65537 bytes, wanted at most 65536");
  long_header.replace(8, 4, "\xff\xff\xff\xff");
  CHECK(refusal(folder, long_header) == "names a header of 4294967295 bytes, wanted at most 65536");
  CHECK(refusal(folder, npy_bytes(dictionary("(2,)"), 0).substr(0, 30)) == "ends within its header");
}

TEST_CASE("npy: a header that is not exactly the dictionary is refused", "[npy][errors]") {
  const TemporaryFolder folder;
  const auto refused = [&](const std::string& header) { return refusal(folder, npy_bytes(header, 24)); };
  CHECK(refused("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'more': 1}") ==
        "its header has the unknown key 'more'");
  CHECK(refused("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}") ==
        "its header has the key 'descr' twice");
  CHECK(refused("{'descr': '<f4', 'shape': (2, 3)}") ==
        "its header lacks one of descr, fortran_order and shape");
  CHECK(refused("{}") == "its header lacks one of descr, fortran_order and shape");

  const std::string not_numpy = "its header is not the dictionary that numpy writes, at '";
  for (const std::string header :
       {"", "{", "}", "x", "{,}", "{'descr'}", "{'descr': }", "{'descr': '<f4}", "{'descr': '<f4\"}",
        "{descr: '<f4'}", "{'descr': '<f4' 'fortran_order': False, 'shape': (2, 3)}",
        "{'desc\\u0072': '<f4'}", "{'descr': '<f4', 'fortran_order': false, 'shape': (2, 3)}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (2, 3)}",
        "{'descr': '<f4', 'fortran_order': Falsely, 'shape': (2, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)} x",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3),,}"}) {
    CAPTURE(header);
    CHECK(refused(header).substr(0, not_numpy.size()) == not_numpy);
  }
  for (const std::string shape :
       {"6", "(6)", "[2, 3]", "(2, 3", "(2 3)", "(2,, 3)", "(,)", "(02, 3)", "(00,)", "(2.0, 3)", "(0x2, 3)",
        "(+2, 3)", "(2L, 3L)", "(2_0, 3)", "('2', 3)", "((2, 3),)", "(2, 3))"}) {
    CAPTURE(shape);
    CHECK(refused(dictionary(shape)).substr(0, not_numpy.size()) == not_numpy);
  }
  CHECK(refused(std::string("{'descr': '<f4'\0}", 17)) == not_numpy + "?}'");
}

TEST_CASE("npy: only regular files are read, others are refused without blocking", "[npy][errors]") {
  const TemporaryFolder folder;
  const auto reason = [&](const std::string& path) -> std::string {
    try {
      npy::read(path);
    } catch (const longspan::FileError& error) {
      return error.what();
    }
    return "";
  };
  CHECK(reason(folder.file("none.npy")) ==
        folder.file("none.npy") + ": cannot be read: No such file or directory");
  CHECK(reason(folder.path()) == folder.path() + ": is not a regular file");
  REQUIRE(mkfifo(folder.file("pipe").c_str(), 0600) == 0);
  CHECK(reason(folder.file("pipe")) == folder.file("pipe") + ": is not a regular file");
  CHECK(reason("/dev/zero") == "/dev/zero: is not a regular file");
}

TEST_CASE("npy: a file with bytes missing, or with one too many, is refused", "[npy][errors]") {
  const TemporaryFolder folder;
  const int version = GENERATE(1, 2, 3);
  std::string bytes = written<float>({2, 3}, distinct_values<float>(6));
  if (version > 1) bytes = npy_bytes(dictionary("(2, 3)"), 24, version);
  for (std::size_t length = 0; length < bytes.size(); ++length) {
    CAPTURE(version, length);
    CHECK(!refusal(folder, bytes.substr(0, length)).empty());
  }
  CHECK(refusal(folder, bytes).empty());
  CHECK(!refusal(folder, bytes + '\0').empty());
}

TEST_CASE("npy: a flipped bit in the header is refused or gives a consistent array", "[npy][errors]") {
  const TemporaryFolder folder;
  // An empty array with another second dimension is still an empty array, so some flips are accepted.
  const std::string bytes =
      GENERATE(written<float>({2, 3}, distinct_values<float>(6)), written<float>({0, 3}, {}),
               npy_bytes(dictionary("(2, 3)"), 24, 2), npy_bytes(dictionary("(0, 3)"), 0, 3));
  const std::size_t header = bytes.find('\n') + 1;
  int refused = 0, read = 0;
  for (std::size_t bit = 0; bit < 8 * header; ++bit) {
    std::string flipped = bytes;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    folder.write("x.npy", flipped);
    try {
      check_consistent(npy::read(folder.file("x.npy")));
      ++read;
    } catch (const longspan::FileError&) {
      ++refused;
    }
  }
  CHECK(refused > 0);
  const bool empty = header == bytes.size(), version_is_a_bit_from_another = bytes[6] != 1;  // 2.0 and 3.0
  CHECK((read > 0) == (empty || version_is_a_bit_from_another));
}

TEST_CASE("npy: randomly damaged files are refused or give a consistent array", "[npy][errors]") {
  const TemporaryFolder folder;
  const std::string bytes = written<float>({0, 3}, {}) + std::string(8, ' ');
  const std::string alphabet = "{}()[]',:\"\\ 0123456789<>f-TrueFalsdchpo_n\n";
  std::mt19937 random(1);
  int refused = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string damaged = bytes;
    for (auto changes = 1 + random() % 4; changes > 0; --changes) {
      const std::size_t at = random() % damaged.size(), from = random() % damaged.size();
      const std::size_t count = 1 + random() % 8, way = random() % 4;
      if (way == 0) damaged[at] = static_cast<char>(random());
      if (way == 1) damaged[at] = alphabet[random() % alphabet.size()];
      if (way == 2) damaged.erase(at, count);
      if (way == 3) damaged.insert(at, damaged.substr(from, count));
    }
    folder.write("x.npy", damaged);
    try {
      check_consistent(npy::read(folder.file("x.npy")));
    } catch (const longspan::FileError&) {
      ++refused;
    }
  }
  CHECK(refused > 4000);
}
