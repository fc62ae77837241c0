// Landmark tokens in a text: inserting them, their positions, the labels for training, and removing them.
#pragma once

#include <algorithm>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "longspan/detail/call/check_view.hpp"
#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// Whether a block that ends the text also has a landmark.
enum class LastLandmark : unsigned char {
  stands,  ///< a landmark after every complete block
  omitted  ///< landmarks only between blocks
};

/// How the loss treats landmarks. Both variants are published: the first for training from scratch, the second for
/// fine-tuning.
enum class LandmarkLoss : unsigned char {
  skips,    ///< a landmark predicts nothing, and the token before it predicts the token after it
  includes  ///< the token before a landmark predicts it, and the landmark predicts the token after it
};

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN

namespace detail {

inline void check_block_size(std::string_view function, Index block_size, Index least) {
  if (block_size < least)
    refuse(function, "block_size", std::to_string(block_size), "at least " + std::to_string(least));
}

}  // namespace detail

/// The tokens with a landmark after every `block_size - 1` of them, so that every block_size-th token of the
/// result is a landmark, as in `landmarks::every(block_size)`. An incomplete block at the end has none.
template <class Token>
std::vector<Token> with_landmarks(std::span<const Token> tokens, Index block_size, Token landmark,
                                  LastLandmark last = LastLandmark::stands) {
  detail::check_block_size("with_landmarks", block_size, 2);
  const Index count = static_cast<Index>(tokens.size()), between = block_size - 1;
  std::vector<Token> result;
  result.reserve(static_cast<std::size_t>(count + count / between));
  for (Index t = 0; t < count; ++t) {
    result.push_back(tokens[static_cast<std::size_t>(t)]);
    const bool ends_block = (t + 1) % between == 0, ends_text = t + 1 == count;
    if (ends_block && !(ends_text && last == LastLandmark::omitted)) result.push_back(landmark);
  }
  return result;
}

template <class Token>
std::vector<Token> without_landmarks(std::span<const Token> tokens, Token landmark) {
  std::vector<Token> result;
  std::copy_if(tokens.begin(), tokens.end(), std::back_inserter(result),
               [&](const Token& token) { return token != landmark; });
  return result;
}

/// The indices of the landmarks in rising order, as `landmarks::at` takes them.
template <class Token>
std::vector<Index> landmark_keys(std::span<const Token> tokens, Token landmark) {
  std::vector<Index> keys;
  for (std::size_t j = 0; j < tokens.size(); ++j) {
    if (tokens[j] == landmark) keys.push_back(static_cast<Index>(j));
  }
  return keys;
}

/// The same for a mask that is not 0 at landmarks.
inline std::vector<Index> landmark_keys(std::span<const unsigned char> mask) {
  std::vector<Index> keys;
  for (std::size_t j = 0; j < mask.size(); ++j) {
    if (mask[j] != 0) keys.push_back(static_cast<Index>(j));
  }
  return keys;
}

/// A mask that is 1 at landmarks and 0 at all other tokens.
template <class Token>
std::vector<unsigned char> landmark_mask(std::span<const Token> tokens, Token landmark) {
  std::vector<unsigned char> mask;
  for (const Token& token : tokens) mask.push_back(token == landmark);
  return mask;
}

/// The position of every token. `jumps` has one number for each landmark, which is added to the positions after that
/// landmark: random jumps in training teach a model distances beyond its context (appendix E of the paper). Without
/// jumps the positions are 0, 1, 2, ...
template <class Token>
std::vector<Index> landmark_positions(std::span<const Token> tokens, Token landmark,
                                      std::span<const Index> jumps = {}) {
  const auto count = static_cast<std::size_t>(std::count(tokens.begin(), tokens.end(), landmark));
  if (!jumps.empty() && jumps.size() != count) {
    detail::refuse("landmark_positions", "the number of jumps", std::to_string(jumps.size()),
                   std::to_string(count) + ", one for each landmark");
  }
  for (const Index jump : jumps) {
    if (jump < 0) detail::refuse("landmark_positions", "a jump", std::to_string(jump), "at least 0");
  }
  std::vector<Index> positions;
  Index next = 0;
  std::size_t jump = 0;
  for (const Token& token : tokens) {
    positions.push_back(next++);
    if (!jumps.empty() && token == landmark) next += jumps[jump++];
  }
  return positions;
}

/// The token that each position has to predict: labels[j] belongs to the output at j, already shifted. The label is
/// `ignored` where nothing is learned: at the end, and at landmarks that the loss skips.
template <class Token>
std::vector<Token> landmark_labels(std::span<const Token> tokens, Token landmark, LandmarkLoss loss,
                                   Token ignored) {
  std::vector<Token> labels(tokens.size(), ignored);
  Token next = ignored;
  for (std::size_t j = tokens.size(); j-- > 0;) {
    const bool skipped = loss == LandmarkLoss::skips && tokens[j] == landmark;
    if (skipped) continue;
    labels[j] = next;
    next = tokens[j];
  }
  return labels;
}

/// For each token the row of the logits that predicts what follows it, where logits have one row for each token and
/// landmark: the row of token t, or of the landmark after it if the loss includes landmarks.
template <class Token>
std::vector<Index> logit_rows(std::span<const Token> tokens, Token landmark, LandmarkLoss loss) {
  std::vector<Index> rows;
  for (std::size_t j = 0; j < tokens.size(); ++j) {
    if (tokens[j] != landmark) {
      rows.push_back(static_cast<Index>(j));
    } else if (loss == LandmarkLoss::includes && !rows.empty()) {
      rows.back() = static_cast<Index>(j);
    }
  }
  return rows;
}

/// Copies these rows: logits [tokens and landmarks, vocabulary] to [tokens, vocabulary].
template <class T, class Token>
void remove_landmark_logits(MatrixView<const T> logits, std::span<const Token> tokens, Token landmark,
                            LandmarkLoss loss, MatrixView<T> to) {
  constexpr const char* name = "remove_landmark_logits";
  const std::vector<Index> rows = logit_rows(tokens, landmark, loss);
  const auto text = [](Index of_rows, Index cols) {
    return "[" + std::to_string(of_rows) + ", " + std::to_string(cols) + "]";
  };
  detail::check_view(name, "logits", logits);
  detail::check_view(name, "the result", to);
  if (logits.rows != static_cast<Index>(tokens.size())) {
    detail::refuse(name, "logits", text(logits.rows, logits.cols),
                   text(static_cast<Index>(tokens.size()), logits.cols));
  }
  if (to.rows != static_cast<Index>(rows.size()) || to.cols != logits.cols) {
    detail::refuse(name, "the result", text(to.rows, to.cols),
                   text(static_cast<Index>(rows.size()), logits.cols));
  }
  for (Index t = 0; t < to.rows; ++t)
    std::copy_n(logits.row(rows[static_cast<std::size_t>(t)]), to.cols, to.row(t));
}

/// The maximum number of tokens and landmarks in one chunk of a model with `context` positions, of which `top_k`
/// retrieved blocks of `block_size` keys and one empty block take their share. Throws Error if no position is left.
inline Index landmark_chunk_length(Index context, Index block_size, Index top_k) {
  detail::check_block_size("landmark_chunk_length", block_size, 1);
  const Index blocks = context / block_size;
  if (top_k < 0) detail::refuse("landmark_chunk_length", "top_k", std::to_string(top_k), "at least 0");
  if (top_k > blocks - 2) {
    detail::refuse("landmark_chunk_length", "top_k", std::to_string(top_k),
                   "less than " + std::to_string(blocks - 1) + " for " + std::to_string(context) +
                       " positions and blocks of " + std::to_string(block_size));
  }
  return (blocks - top_k - 1) * block_size;
}

LONGSPAN_NAMESPACE_END
