// A human-readable error: one sentence of cause, one of what to do.
#pragma once

#include <exception>
#include <string>
#include <utility>

namespace transom {

class Error : public std::exception {
public:
    Error(std::string cause, std::string fix)
        : cause(sentence(std::move(cause))), fix(sentence(std::move(fix))), whole_(this->cause + " " + this->fix) {}

    const char* what() const noexcept override { return whole_.c_str(); }

    const std::string cause;
    const std::string fix;

private:
    // Ends with exactly one full stop, however a library's own text ends.
    static std::string sentence(std::string text) {
        while (!text.empty() && (text.back() == '.' || text.back() == '\n' || text.back() == ' ')) text.pop_back();
        return text + ".";
    }

    std::string whole_;
};

}  // namespace transom
