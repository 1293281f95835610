// Stop strings in a text that arrives in pieces: which text may be shown, and when to stop.
#pragma once

#include <string>
#include <vector>

namespace transom {

class StopStrings {
public:
    explicit StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {}

    // Take the next piece; returns the text that may be shown. A possible beginning of a stop string is held back.
    std::string push(const std::string& text);
    // The text that was held back, once no more text comes.
    std::string finish() { return std::move(held_); }
    bool found() const { return found_; }

private:
    std::vector<std::string> stops_;
    std::string held_;
    bool found_ = false;
};

}  // namespace transom
