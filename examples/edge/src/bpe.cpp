#include "bpe.hpp"

#include <cstdio>
#include <queue>

#include <nlohmann/json.hpp>

#include "error.hpp"
#include "files.hpp"
#include "unicode.hpp"

namespace transom {

namespace {

uint64_t pair_key(int64_t left, int64_t right) {
    return (static_cast<uint64_t>(left) << 32) | static_cast<uint64_t>(right);
}

Error bad_tokenizer(const std::string& what) { return {"The tokenizer is damaged: " + what, "Copy the bundle again"}; }

}  // namespace

Bpe::Bpe(const nlohmann::json& data) {
    const auto refused = [](const std::string& what) {
        return Error("The tokenizer has " + what + ", which this program does not know",
                     "Tokenize with another library and give the program --ids");
    };
    const auto type = data.value("type", std::string("BPE"));
    if (type != "BPE") throw refused("a model of the kind " + type);
    const auto set = [&data](const char* name) {
        const auto found = data.find(name);
        return found != data.end() && !found->is_null() && *found != "" && *found != 0.0;
    };
    for (const char* name : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"})
        if (set(name)) throw refused(name);
    fuse_unknown_ = data.value("fuse_unk", false);
    byte_fallback_ = data.value("byte_fallback", false);
    ignore_merges_ = data.value("ignore_merges", false);
    for (const auto& [token, id] : data.at("vocab").items()) {
        const int64_t place = whole_number(id, 0, UINT32_MAX);
        vocabulary_.emplace(token, place);
        tokens_[place] = token;
    }
    if (set("unk_token")) {
        const auto token = data["unk_token"].get<std::string>();
        unknown_ = find(token);
        if (unknown_ < 0) throw bad_tokenizer("its unknown token " + token + " is not in its vocabulary");
    }
    uint32_t rank = 0;
    for (const auto& line : data.at("merges")) {
        std::string left, right;
        if (line.is_string()) {
            const auto text = line.get<std::string>();
            const size_t space = text.find(' ');
            left = text.substr(0, space);
            right = space == text.npos ? "" : text.substr(space + 1);
        } else {
            left = line.at(0).get<std::string>();
            right = line.at(1).get<std::string>();
        }
        const int64_t a = find(left), b = find(right), joint = find(left + right);
        if (a < 0 || b < 0 || joint < 0) throw bad_tokenizer("the merge " + line.dump() + " is not of tokens");
        merges_[pair_key(a, b)] = {rank++, joint};
    }
}

int64_t Bpe::find(const std::string& token) const {
    const auto found = vocabulary_.find(token);
    return found == vocabulary_.end() ? -1 : found->second;
}

const Bpe::Merge* Bpe::merge(int64_t left, int64_t right) const {
    const auto found = merges_.find(pair_key(left, right));
    return found == merges_.end() ? nullptr : &found->second;
}

// Ids of single characters, of their bytes, or of the unknown token.
std::vector<int64_t> Bpe::characters(const std::string& word) const {
    std::vector<int64_t> ids;
    bool unknown = false;  // an unknown token is pending
    for (size_t at = 0; at < word.size();) {
        const std::string character = word.substr(at, character_bytes(word[at]));
        at += character.size();
        if (const int64_t id = find(character); id >= 0) {
            if (unknown) ids.push_back(unknown_);
            unknown = false;
            ids.push_back(id);
            continue;
        }
        if (byte_fallback_) {
            std::vector<int64_t> bytes;
            for (const char byte : character) {
                char name[8];
                std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned>(static_cast<unsigned char>(byte)));
                if (const int64_t id = find(name); id >= 0) bytes.push_back(id);
            }
            if (bytes.size() == character.size()) {
                ids.insert(ids.end(), bytes.begin(), bytes.end());
                continue;
            }
        }
        if (unknown_ < 0) continue;  // without an unknown token, such a character is dropped
        if (unknown && !fuse_unknown_) ids.push_back(unknown_);
        unknown = true;
    }
    if (unknown) ids.push_back(unknown_);
    return ids;
}

void Bpe::encode(const std::string& word, std::vector<int64_t>& out) const {
    if (ignore_merges_)
        if (const int64_t id = find(word); id >= 0) return out.push_back(id);
    std::vector<int64_t> ids = characters(word);
    const auto count = static_cast<int64_t>(ids.size());
    std::vector<int64_t> before(ids.size()), after(ids.size());  // a linked list of the remaining symbols
    for (int64_t i = 0; i < count; ++i) {
        before[i] = i - 1;
        after[i] = i + 1 < count ? i + 1 : -1;
    }
    struct Candidate {
        uint32_t rank;
        int64_t place;
        int64_t id;
        bool operator<(const Candidate& other) const {  // the queue returns the largest first
            return rank != other.rank ? rank > other.rank : place > other.place;
        }
    };
    std::priority_queue<Candidate> queue;
    const auto consider = [&](int64_t place) {
        if (place < 0 || after[place] < 0) return;
        if (const Merge* found = merge(ids[place], ids[after[place]])) queue.push({found->rank, place, found->id});
    };
    for (int64_t i = 0; i < count; ++i) consider(i);
    while (!queue.empty()) {
        const Candidate best = queue.top();
        queue.pop();
        const int64_t left = best.place;
        if (ids[left] < 0 || after[left] < 0) continue;
        const int64_t right = after[left];
        const Merge* now = merge(ids[left], ids[right]);
        if (now == nullptr || now->id != best.id) continue;  // a neighbour was merged meanwhile
        ids[left] = best.id;
        ids[right] = -1;
        after[left] = after[right];
        if (after[left] >= 0) before[after[left]] = left;
        consider(before[left]);
        consider(left);
    }
    for (const int64_t id : ids)
        if (id >= 0) out.push_back(id);
}

}  // namespace transom
