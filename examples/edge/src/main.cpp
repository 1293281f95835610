// transom-edge: runs a bundle from `transom export` on a device without Python.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <iostream>
#include <map>
#include <new>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "error.hpp"
#include "generate.hpp"
#include "judge.hpp"

namespace {

using namespace transom;

const char* const usage = R"(transom-edge BUNDLE [options]: run a bundle from `transom export`.

Actions; they can be combined:
  --judge               report which variants this device can run, from the manifest alone
  --check               compare every file with the manifest
  --verify              run the manifest's fixed prompt, and compare with the reference
  --prompt TEXT         answer this text
  --ids 1,2,3           answer these token ids

Options:
  --rendered            the prompt is a rendered chat template: add no beginning or end tokens to it
  --max-tokens N        most tokens of the answer (default: until the model ends or its context is full)
  --temperature T --top-k K --top-p P --seed S
                        how tokens are sampled (defaults: the bundle's generation.json)
  --variant NAME        use this variant, even if it does not fit
  --threads N           CPU threads
  --print-ids           print token ids in place of text
  --stats               print times to standard error
  --device FILE         judge for the first device in this file from `transom doctor --json`
  --onnxruntime PATH    the library of ONNX Runtime
  --qnn-provider PATH   a library that adds QNN to an ONNX Runtime without it
  --qnn-backend PATH    QNN's own library instead of libQnnHtp.so
  --qnn-on-cpu          run a qnn variant's plain ONNX graphs on the CPU
)";

const std::set<std::string> flags = {"--judge", "--check", "--verify", "--rendered", "--print-ids", "--stats", "--qnn-on-cpu"};
const std::set<std::string> options = {"--prompt", "--ids", "--max-tokens", "--temperature", "--top-k", "--top-p",
                                       "--seed", "--variant", "--threads", "--device", "--onnxruntime",
                                       "--qnn-provider", "--qnn-backend"};

struct Arguments {
    std::string bundle;
    std::map<std::string, std::string> values;  // empty for a flag

    bool has(const std::string& name) const { return values.count(name) > 0; }
    std::string text(const std::string& name, const std::string& otherwise = "") const {
        const auto found = values.find(name);
        return found == values.end() ? otherwise : found->second;
    }
    template <typename Number>
    std::optional<Number> number(const std::string& name) const {
        if (!has(name)) return std::nullopt;
        return parsed<Number>(name, text(name));
    }
    template <typename Number>
    static Number parsed(const std::string& name, const std::string& text) {
        try {
            size_t used = 0;
            Number value;
            if constexpr (std::is_floating_point_v<Number>) {
                value = std::stod(text, &used);
            } else {
                const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
                used = code == std::errc() ? static_cast<size_t>(end - text.data()) : 0;
            }
            if (used == text.size() && used > 0) return value;
        } catch (const std::logic_error&) {  // not a number, or too large: reported below
        }
        throw Error(name + " is \"" + text + "\", which is not a valid number", "See transom-edge --help");
    }
};

Arguments parse(int count, char** words) {
    Arguments arguments;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (flags.count(word) > 0) {
            arguments.values[word] = "";
        } else if (options.count(word) > 0) {
            if (i + 1 == count) throw Error(word + " has no value", "See transom-edge --help");
            arguments.values[word] = words[++i];
        } else if (word.compare(0, 2, "--") == 0 || !arguments.bundle.empty()) {
            throw Error(word + " is not known", "See transom-edge --help");
        } else {
            arguments.bundle = word;
        }
    }
    if (arguments.bundle.empty()) throw Error("No bundle was named", "See transom-edge --help");
    if (arguments.has("--prompt") && arguments.has("--ids")) throw Error("--prompt and --ids exclude each other", "Give one");
    return arguments;
}

std::vector<int64_t> id_list(const std::string& text) {
    std::vector<int64_t> ids;
    for (size_t start = 0; start <= text.size();) {
        const size_t comma = std::min(text.find(',', start), text.size());
        ids.push_back(Arguments::parsed<int64_t>("--ids", text.substr(start, comma - start)));
        if (ids.back() < 0) throw Error("--ids has the token id " + std::to_string(ids.back()), "Token ids are 0 or more");
        start = comma + 1;
    }
    return ids;
}

// The prompt and options; everything that can be wrong with them is found before a model is opened.
struct Request {
    bool ids_only;
    std::optional<Tokenizer> tokenizer;
    Defaults defaults;
    Wanted wanted;
};

Request request_of(const Arguments& arguments, const Manifest& manifest) {
    Request request;
    request.ids_only = arguments.has("--print-ids");
    if (manifest.has("generation.json")) request.defaults = read_defaults(manifest.folder / "generation.json");
    request.wanted.max_tokens = arguments.number<int64_t>("--max-tokens");
    if (request.wanted.max_tokens.value_or(1) < 1) throw Error("--max-tokens is below 1", "Give 1 or more");
    request.wanted.sampling = request.defaults.sampling(
        {arguments.number<double>("--temperature"), arguments.number<int64_t>("--top-k"),
         arguments.number<double>("--top-p"), arguments.number<uint64_t>("--seed")});
    if (arguments.has("--ids")) request.wanted.prompt = id_list(arguments.text("--ids"));
    if (arguments.has("--prompt") || (arguments.has("--ids") && !request.ids_only)) {
        if (!manifest.has("tokenizer.json"))
            throw Error("The bundle " + manifest.folder.string() + " has no tokenizer", "Give --ids and --print-ids");
        request.tokenizer = Tokenizer::open(manifest.folder / "tokenizer.json");
    }
    if (arguments.has("--prompt")) {
        Encoding how;
        how.add_special = !arguments.has("--rendered");
        request.wanted.prompt = request.tokenizer->encode(arguments.text("--prompt"), how);
    }
    return request;
}

// Prints the answer as it is generated, and the times if requested.
void answer(const Request& request, Decoder& decoder, bool stats) {
    bool first = true;
    const auto print = [&](int64_t id, const std::string& text) {
        if (!request.ids_only) {
            std::cout << text << std::flush;
        } else if (id >= 0) {
            std::cout << (first ? "" : ",") << id << std::flush;
            first = false;
        }
        return std::cout.good();
    };
    const Tokenizer* tokenizer = request.tokenizer ? &*request.tokenizer : nullptr;
    const Answer said = generate(decoder, tokenizer, request.defaults, request.wanted, print);
    std::cout << std::endl;
    if (!stats) return;
    const auto told = [](const char* what, size_t tokens, double seconds) {
        std::fprintf(stderr, "%s: %zu tokens, %.3f s, %.1f tokens/s", what, tokens, seconds,
                     static_cast<double>(tokens) / std::max(seconds, 1e-9));
    };
    told("prompt", request.wanted.prompt.size(), said.prompt_seconds);
    told("; answer", said.ids.size(), said.answer_seconds);
    std::fprintf(stderr, " (%s)\n", said.reason.c_str());
}

int run(const Arguments& arguments) {
    const Manifest manifest = read_manifest(arguments.bundle);
    Settings settings;
    settings.libraries.onnxruntime = arguments.text("--onnxruntime");
    settings.libraries.qnn_provider = arguments.text("--qnn-provider");
    settings.libraries.qnn_backend = arguments.text("--qnn-backend", settings.libraries.qnn_backend);
    settings.threads = arguments.number<int16_t>("--threads").value_or(0);
    if (arguments.has("--threads") && settings.threads < 1) throw Error("--threads is below 1", "Give 1 or more");
    settings.qnn_on_cpu = arguments.has("--qnn-on-cpu");
    const Request request = request_of(arguments, manifest);
    const auto device = [&] {
        return arguments.has("--device") ? read_device(arguments.text("--device")) : this_device(settings.libraries);
    };
    bool good = true;
    if (arguments.has("--judge")) {
        good = false;
        for (const Verdict& verdict : judge(manifest, device())) {
            std::cout << verdict.variant << (verdict.fits ? ": fits. " : ": does not fit. ") << verdict.reason << "\n";
            good = good || verdict.fits;
        }
    }
    if (arguments.has("--check")) {
        check_files(manifest);
        std::cout << manifest.files.size() << " files match the manifest\n";
    }
    const bool verifies = arguments.has("--verify"), answers = arguments.has("--prompt") || arguments.has("--ids");
    if (!verifies && !answers) return good ? 0 : 1;
    const Variant& variant = arguments.has("--variant") ? manifest.variant(arguments.text("--variant"))
                                                        : fitting(manifest, device());
    if (verifies) {
        const auto decoder = open_decoder(manifest, variant, settings);
        const size_t same = agreeing(*decoder, manifest), all = manifest.expected_tokens.size();
        std::cout << variant.name << ": " << same << " of " << all << " most likely tokens match the reference\n";
        // Rounding decides between near ties, and 4-bit weights make many more of them
        good = variant.exact ? 10 * same >= 9 * all : 3 * same >= 2 * all;
    }
    if (answers) answer(request, *open_decoder(manifest, variant, settings), arguments.has("--stats"));
    return good ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
    try {
        if (count < 2 || std::string(words[1]) == "--help") {
            std::cout << usage;
            return count < 2 ? 2 : 0;
        }
        return run(parse(count, words));
    } catch (const std::bad_alloc&) {
        std::cerr << "transom-edge: There is not enough memory. Export the model with a smaller --context." << std::endl;
    } catch (const std::exception& error) {
        std::cerr << "transom-edge: " << error.what() << std::endl;
    }
    return 2;
}
