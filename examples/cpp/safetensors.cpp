// SPDX-License-Identifier: Apache-2.0
#include "safetensors.h"

#include <cstring>
#include <fstream>
#include <limits>
#include <set>
#include <stdexcept>
#include <utility>

namespace safetensors {
namespace {

constexpr std::uint64_t kMaxHeader = 100'000'000;  // the format's own limit

std::uint64_t item_size(const std::string& dtype) {
  static const std::map<std::string, std::uint64_t> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
      {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},
      {"I32", 4},  {"F32", 4}, {"U64", 8}, {"I64", 8},     {"F64", 8}};
  const auto found = sizes.find(dtype);
  if (found == sizes.end()) throw std::runtime_error("unknown dtype '" + dtype + "'");
  return found->second;
}

struct Entry {
  std::string dtype;
  std::vector<std::uint64_t> shape, offsets;
};

// The header's subset of JSON: objects of strings, strings, arrays of non-negative integers.
class Header {
 public:
  explicit Header(const std::string& text) : text_(text) {}

  std::map<std::string, Entry> parse() {
    std::map<std::string, Entry> entries;
    members([&](const std::string& name) {
      if (name == "__metadata__")
        members([&](const std::string&) { string(); });
      else
        entries.emplace(name, entry());
    });
    space();
    if (at_ != text_.size()) fail("characters after the object");
    return entries;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("bad header at byte " + std::to_string(at_) + ": " + what);
  }
  void space() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_]) && text_[at_] != '\0') ++at_;
  }
  bool take(char c) {
    space();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail(std::string("wanted '") + c + "'");
  }

  template <class Value>
  void members(Value&& value) {
    std::set<std::string> seen;
    expect('{');
    if (take('}')) return;
    do {
      const std::string name = string();
      if (!seen.insert(name).second) fail("'" + name + "' appears twice");
      expect(':');
      value(name);
    } while (take(','));
    expect('}');
  }

  Entry entry() {
    Entry e;
    std::set<std::string> seen;
    members([&](const std::string& key) {
      seen.insert(key);
      if (key == "dtype")
        e.dtype = string();
      else if (key == "shape")
        e.shape = integers();
      else if (key == "data_offsets")
        e.offsets = integers();
      else
        fail("unknown key '" + key + "'");
    });
    if (seen.size() != 3) fail("a tensor needs dtype, shape and data_offsets");
    if (e.offsets.size() != 2) fail("data_offsets needs two numbers");
    return e;
  }

  std::vector<std::uint64_t> integers() {
    std::vector<std::uint64_t> out;
    expect('[');
    if (take(']')) return out;
    do {
      space();
      const std::size_t begin = at_;
      std::uint64_t value = 0;
      while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
        const auto digit = static_cast<std::uint64_t>(text_[at_++] - '0');
        if (value > (std::numeric_limits<std::int64_t>::max() - digit) / 10) fail("number too big");
        value = 10 * value + digit;
      }
      if (at_ == begin || (text_[begin] == '0' && at_ - begin > 1)) fail("wanted an integer");
      out.push_back(value);
    } while (take(','));
    expect(']');
    return out;
  }

  std::string string() {
    expect('"');
    std::string out;
    while (true) {
      if (at_ == text_.size()) fail("unfinished string");
      const char c = text_[at_++];
      if (c == '"') return out;
      if (static_cast<unsigned char>(c) < 0x20) fail("control character in a string");
      if (c == '\\')
        escape(out);
      else
        out += c;
    }
  }

  void escape(std::string& out) {
    static const std::pair<char, char> plain[] = {{'"', '"'},  {'\\', '\\'}, {'/', '/'},
                                                  {'b', '\b'}, {'f', '\f'},  {'n', '\n'},
                                                  {'r', '\r'}, {'t', '\t'}};
    const char c = at_ < text_.size() ? text_[at_++] : '\0';
    for (const auto& [name, value] : plain)
      if (c == name) {
        out += value;
        return;
      }
    // Other characters stand for themselves in UTF-8; writers escape no more than controls.
    if (c != 'u' || text_.compare(at_, 2, "00") != 0 || text_.size() - at_ < 4)
      fail("an escape this reader does not take");
    const std::string digits = text_.substr(at_ + 2, 2);
    if (digits.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos || digits[0] > '7')
      fail("an escape this reader does not take");
    out += static_cast<char>(std::stoi(digits, nullptr, 16));
    at_ += 4;
  }

  const std::string& text_;
  std::size_t at_ = 0;
};

std::uint64_t bytes_of(const Entry& e) {
  std::uint64_t bytes = item_size(e.dtype);
  for (const std::uint64_t extent : e.shape) {
    if (extent != 0 && bytes > std::numeric_limits<std::int64_t>::max() / extent)
      throw std::runtime_error("a shape too big for 64 bits");
    bytes *= extent;
  }
  return bytes;
}

File read(const std::string& path) {
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  if (!in) throw std::runtime_error("cannot open the file");
  const auto size = static_cast<std::uint64_t>(in.tellg());
  unsigned char raw[8];
  in.seekg(0);
  if (size < 8 || !in.read(reinterpret_cast<char*>(raw), 8))
    throw std::runtime_error("too short for a header");
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | raw[i];
  if (length > kMaxHeader || length > size - 8)
    throw std::runtime_error("header of " + std::to_string(length) + " bytes does not fit");
  std::string text(length, '\0');
  if (!in.read(text.data(), static_cast<std::streamsize>(length)))
    throw std::runtime_error("cannot read the header");

  const auto entries = Header(text).parse();
  const std::uint64_t available = size - 8 - length;
  std::map<std::pair<std::uint64_t, std::uint64_t>, std::string> spans;  // by place in the file
  for (const auto& [name, e] : entries) {
    const std::uint64_t begin = e.offsets[0], end = e.offsets[1];
    if (begin > end || end > available)
      throw std::runtime_error("'" + name + "' lies outside the file");
    if (bytes_of(e) != end - begin)
      throw std::runtime_error("'" + name + "': shape and data_offsets disagree");
    if (begin < end && !spans.emplace(std::make_pair(begin, end), name).second)
      throw std::runtime_error("'" + name + "' shares its data with another tensor");
  }
  std::uint64_t covered = 0;
  for (const auto& [span, name] : spans) {
    if (span.first != covered)
      throw std::runtime_error("a hole or an overlap before '" + name + "'");
    covered = span.second;
  }
  if (covered != available) throw std::runtime_error("bytes that belong to no tensor");

  File file;
  for (const auto& [name, e] : entries) {
    Tensor& tensor = file[name];
    tensor.dtype = e.dtype;
    tensor.shape.assign(e.shape.begin(), e.shape.end());
    tensor.data.resize(e.offsets[1] - e.offsets[0]);
    in.seekg(static_cast<std::streamoff>(8 + length + e.offsets[0]));
    if (!in.read(reinterpret_cast<char*>(tensor.data.data()),
                 static_cast<std::streamsize>(tensor.data.size())))
      throw std::runtime_error("cannot read '" + name + "'");
  }
  return file;
}

std::string quoted(const std::string& text) {
  static const char* digits = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20)
      out += std::string("\\u00") + digits[byte >> 4] + digits[byte & 15];
    else
      out += c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c);
  }
  return out + '"';
}

}  // namespace

File load(const std::string& path) try { return read(path); } catch (const std::exception& e) {
  throw std::runtime_error(path + ": " + e.what());
}

void save(const std::string& path, const File& tensors) {
  std::string header = "{";
  std::uint64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    header += (header.size() > 1 ? "," : "") + quoted(name) +
              ":{\"dtype\":" + quoted(tensor.dtype) + ",\"shape\":[";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i)
      header += (i > 0 ? "," : "") + std::to_string(tensor.shape[i]);
    header += "],\"data_offsets\":[" + std::to_string(offset) + ",";
    offset += tensor.data.size();
    header += std::to_string(offset) + "]}";
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::ofstream out(path, std::ios::binary);
  for (int shift = 0; shift < 64; shift += 8)
    out.put(static_cast<char>(std::uint64_t{header.size()} >> shift & 0xff));
  out << header;
  for (const auto& [name, tensor] : tensors)
    out.write(reinterpret_cast<const char*>(tensor.data.data()),
              static_cast<std::streamsize>(tensor.data.size()));
  out.close();
  if (!out) throw std::runtime_error(path + ": cannot write the file");
}

}  // namespace safetensors
