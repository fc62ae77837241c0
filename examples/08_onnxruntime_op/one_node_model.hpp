// An ONNX model of a single node, as the bytes that an exporter would write. It stands for your model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

/// A message of Protocol Buffers, field by field; the numbers are those of onnx.proto.
class Message {
 public:
  Message& add(int field, std::int64_t value) {
    put(static_cast<std::uint64_t>(field) << 3);
    put(static_cast<std::uint64_t>(value));
    return *this;
  }
  Message& add(int field, const std::string& value) {
    put(static_cast<std::uint64_t>(field) << 3 | 2);
    put(value.size());
    bytes_ += value;
    return *this;
  }
  Message& add(int field, const Message& value) { return add(field, value.bytes_); }

  const std::string& bytes() const { return bytes_; }

 private:
  void put(std::uint64_t number) {
    for (; number > 0x7f; number >>= 7) bytes_ += static_cast<char>(number | 0x80);
    bytes_ += static_cast<char>(number);
  }

  std::string bytes_;
};

/// A tensor of floats; -1 means any size.
struct Port {
  std::string name;
  std::vector<std::int64_t> sizes;

  Message message() const {
    Message shape;
    for (std::size_t n = 0; n < sizes.size(); ++n) {
      shape.add(1, sizes[n] < 0 ? Message().add(2, name + std::to_string(n)) : Message().add(1, sizes[n]));
    }
    return Message().add(1, name).add(2, Message().add(1, Message().add(1, 1).add(2, shape)));
  }
};

using Numbers = std::vector<std::pair<std::string, std::int64_t>>;

/// `domains` are the domains of operators with their versions; the node belongs to the last one.
inline std::string one_node_model(const Numbers& domains, const std::string& operation,
                                  const Numbers& attributes, const std::vector<Port>& inputs,
                                  const Port& output) {
  Message node, graph, model;
  for (const Port& input : inputs) node.add(1, input.name);
  node.add(2, output.name).add(4, operation).add(7, domains.back().first);
  for (const auto& [name, value] : attributes) node.add(5, Message().add(1, name).add(3, value).add(20, 2));

  graph.add(1, node).add(2, "one node");
  for (const Port& input : inputs) graph.add(11, input.message());
  graph.add(12, output.message());

  model.add(1, 8).add(7, graph);
  for (const auto& [domain, version] : domains) model.add(8, Message().add(1, domain).add(2, version));
  return model.bytes();
}
