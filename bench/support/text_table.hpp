// A table in fixed-width characters.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace bench {

class TextTable {
 public:
  enum class Align : unsigned char { left, right };

  void add_column(std::string title, Align align) { columns_.push_back({std::move(title), align, 0}); }

  void add_row(std::vector<std::string> cells) { rows_.push_back({std::move(cells), {}}); }
  /// A row whose last cells are replaced by one sentence.
  void add_row(std::vector<std::string> cells, std::string note) {
    rows_.push_back({std::move(cells), std::move(note)});
  }
  void add_rule() { rows_.push_back({}); }

  std::string text() const {
    std::vector<Column> columns = columns_;
    for (Column& column : columns) column.width = column.title.size();
    for (const Row& row : rows_) {
      for (std::size_t c = 0; c < row.cells.size(); ++c)
        columns[c].width = std::max(columns[c].width, row.cells[c].size());
    }
    std::size_t width = 2 * (columns.size() - 1);
    for (const Column& column : columns) width += column.width;
    std::vector<std::string> titles;
    for (const Column& column : columns) titles.push_back(column.title);
    const std::string rule = std::string(width, '-') + "\n";
    std::string text = line(columns, {titles, {}}) + rule;
    for (const Row& row : rows_) text += row.cells.empty() ? rule : line(columns, row);
    return text;
  }

 private:
  struct Column {
    std::string title;
    Align align;
    std::size_t width;
  };
  struct Row {
    std::vector<std::string> cells;
    std::string note;
  };

  static std::string line(const std::vector<Column>& columns, const Row& row) {
    std::string text;
    for (std::size_t c = 0; c < row.cells.size(); ++c) {
      const std::string blank(columns[c].width - row.cells[c].size(), ' ');
      text += (c > 0 ? "  " : "") +
              (columns[c].align == Align::left ? row.cells[c] + blank : blank + row.cells[c]);
    }
    if (!row.note.empty()) text += "  " + row.note;
    text.erase(text.find_last_not_of(' ') + 1);
    return text + "\n";
  }

  std::vector<Column> columns_;
  std::vector<Row> rows_;
};

}  // namespace bench
