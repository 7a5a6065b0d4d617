// One reader of a folder's files under libFuzzer, chosen by READER (docs/device.md): bytes in, a refusal or nothing out.
#include <cstdlib>
#include <string>
#include <string_view>

#include "runtime/folder/description.h"
#include "runtime/folder/tensors.h"
#include "runtime/ppm.h"
#include "runtime/text/stream.h"
#include "runtime/text/tokenizer.h"

using namespace bellbox;

namespace {

// JSON as a configuration: what is read, is read again from its canonical text.
[[maybe_unused]] void json(std::string_view bytes) {
    const Json value = parse_json(bytes, "input");
    const std::string text = canonical(value);
    if (canonical(parse_json(text, "canonical")) != text) std::abort();
    read_description(bytes, "input");
}

[[maybe_unused]] void tensors(std::string_view bytes) {
    for (const auto& [name, tensor] : read_tensors(bytes, "input")) {
        const char *const begin = tensor.bytes.data(), *const end = begin + tensor.bytes.size();
        if (!tensor.bytes.empty() && (begin < bytes.data() || end > bytes.data() + bytes.size())) std::abort();
        if (tensor.count() * bytes_of(tensor.number) != static_cast<int64_t>(tensor.bytes.size())) std::abort();
    }
}

// A tokenizer.json, a zero byte, a text.
[[maybe_unused]] void tokenizer(std::string_view bytes) {
    const size_t end = std::min(bytes.find('\0'), bytes.size());
    const Tokenizer words(bytes.substr(0, end));
    const std::vector<uint32_t> ids = words.encode(std::string(bytes.substr(std::min(end + 1, bytes.size()))));
    TextStream stream(words, {});
    for (const uint32_t id : ids) stream.push(id);
    stream.flush();
}

[[maybe_unused]] void picture(std::string_view bytes) { PictureReader(bytes, "input").read(); }

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, size_t size) {
    try {
        READER(std::string_view(reinterpret_cast<const char*>(data), size));
    } catch (const Error&) {
    }
    return 0;
}
