#include "stop_strings.hpp"

#include <algorithm>

namespace transom {

std::string StopStrings::push(const std::string& text) {
    held_ += text;
    size_t end = held_.npos, start = held_.npos;  // of the stop string that completes first; the longest if several do
    size_t keep = 0;
    for (const std::string& stop : stops_) {
        const size_t at = held_.find(stop);
        if (at != held_.npos && (at + stop.size() < end || (at + stop.size() == end && at < start))) {
            end = at + stop.size();
            start = at;
        }
        for (size_t length = std::min(stop.size() - 1, held_.size()); length > keep; --length)
            if (held_.compare(held_.size() - length, length, stop, 0, length) == 0) keep = length;
    }
    found_ = end != held_.npos;
    std::string shown = held_.substr(0, found_ ? start : held_.size() - keep);
    held_ = found_ ? "" : held_.substr(held_.size() - keep);
    return shown;
}

}  // namespace transom
