#include "longspan/error.hpp"

#include <stdexcept>
#include <string>
#include <type_traits>

#include "longspan/view.hpp"
#include "support/catch.hpp"
#include "support/refusal.hpp"

using longspan::Index;
namespace detail = longspan::detail;

TEST_CASE("Error: is a std::invalid_argument that keeps its text", "[error]") {
  STATIC_REQUIRE(std::is_base_of_v<std::invalid_argument, longspan::Error>);
  CHECK(std::string(longspan::Error("the text").what()) == "the text");
  CHECK(std::string(longspan::Error(std::string("the text")).what()) == "the text");
  CHECK_THROWS_AS(detail::raise("no"), std::invalid_argument);
}

TEST_CASE("FileError: is a std::runtime_error with the given text, and not an Error", "[error]") {
  STATIC_REQUIRE(std::is_base_of_v<std::runtime_error, longspan::FileError>);
  STATIC_REQUIRE_FALSE(std::is_base_of_v<longspan::Error, longspan::FileError>);
  CHECK(std::string(longspan::FileError("the text").what()) == "the text");
  CHECK(std::string(longspan::FileError(std::string("the text")).what()) == "the text");
  CHECK(test::file_refusal([] { detail::refuse<longspan::FileError>("load", "the file", "empty", "one"); }) ==
        "longspan: load: the file is empty, wanted one");
  CHECK(test::file_refusal([] { detail::fail<longspan::FileError>("load", "cannot open x"); }) ==
        "longspan: load: cannot open x");
}

TEST_CASE("refuse: the text names function, argument, got and wanted", "[error]") {
  CHECK(test::refusal([] { detail::refuse("attend", "k", "[1, 2, 3, 4]", "[1, 2, 3, 5]"); }) ==
        "longspan: attend: k is [1, 2, 3, 4], wanted [1, 2, 3, 5]");
  CHECK(test::refusal([] { detail::refuse("", "", "", ""); }) == "longspan: :  is , wanted ");
}

TEST_CASE("raise: accepts a text of any length", "[error]") {
  const std::string text(10000, 'x');
  CHECK(test::refusal([&] { detail::raise(text.c_str()); }) == text);
}

TEST_CASE("shape_text: from numbers and from views", "[error]") {
  CHECK(std::string_view(detail::shape_text(1, 2, 3)) == "[1, 2, 3]");
  CHECK(std::string_view(detail::shape_text(1, 2, 3, 4)) == "[1, 2, 3, 4]");
  CHECK(std::string_view(detail::shape_text(0, 0, 0, 0)) == "[0, 0, 0, 0]");
  CHECK(std::string_view(detail::shape_text(-1, 0, Index{1} << 40)) == "[-1, 0, 1099511627776]");
  CHECK(std::string_view(detail::shape_text(
            longspan::TensorView<const float>{nullptr, 2, 3, 5, 7, 9, 9, 9})) == "[2, 3, 5, 7]");
  CHECK(std::string_view(detail::shape_text(longspan::RowsView<double>{nullptr, 2, 3, 5, 9, 9, 9})) ==
        "[2, 3, 5]");
}
