// The fields of a JSON object, each asked for once, by kind and range; what is left over is unknown and refused.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "runtime/text/json.h"

namespace bellbox {

class Fields {
  public:
    Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
        if (!object.is_object()) throw Error(where_ + ": is no object");
    }

    [[noreturn]] void refuse(const std::string& name, const std::string& why) const { throw Error(where_ + ": field " + shown(name) + ": " + why); }

    bool has(const std::string& name) const { return object_.contains(name); }
    const Json& any(const std::string& name) {
        const auto found = object_.find(name);
        if (found == object_.end()) refuse(name, "is missing");
        asked_.insert(name);
        return *found;
    }
    int64_t integer(const std::string& name, int64_t least, int64_t most) {
        const Json& value = any(name);
        if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(most)) ||
            value.get<int64_t>() < least || value.get<int64_t>() > most)
            refuse(name, "must be a whole number from " + std::to_string(least) + " to " + std::to_string(most));
        return value.get<int64_t>();
    }
    double number(const std::string& name) {
        const Json& value = any(name);
        if (!value.is_number() || !std::isfinite(value.get<double>())) refuse(name, "must be a finite number");
        return value.get<double>();
    }
    bool flag(const std::string& name) {
        const Json& value = any(name);
        if (!value.is_boolean()) refuse(name, "must be true or false");
        return value.get<bool>();
    }
    std::string text(const std::string& name) {
        const Json& value = any(name);
        if (!value.is_string()) refuse(name, "must be a string");
        return value.get<std::string>();
    }
    std::string one_of(const std::string& name, const std::vector<std::string>& choices) {
        const std::string value = text(name);
        for (const std::string& each : choices)
            if (each == value) return value;
        refuse(name, "is " + shown(value) + ", which is unknown");
    }
    Fields object(const std::string& name) { return Fields(any(name), where_ + ": " + name); }
    const std::string& where() const { return where_; }

    void done() const {
        for (const auto& [name, value] : object_.items())
            if (asked_.count(name) == 0) refuse(name, "is unknown");
    }

  private:
    const Json& object_;
    std::string where_;
    std::set<std::string> asked_;
};

}  // namespace bellbox
