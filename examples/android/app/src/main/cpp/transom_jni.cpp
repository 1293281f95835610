// The functions that Native.kt declares. Errors of the runner become a TransomException; nothing else is thrown.
#include <jni.h>

#include <filesystem>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "error.hpp"
#include "generate.hpp"
#include "judge.hpp"
#include "text.hpp"

namespace {

using namespace transom;

// An opened bundle.
struct Model {
    Tokenizer tokenizer;
    Defaults defaults;
    std::string variant;
    std::unique_ptr<Decoder> decoder;
};

void raise(JNIEnv* env, const char* what) {
    if (env->ExceptionCheck()) return;  // a Java exception is pending
    const jclass type = env->FindClass("dev/transom/edge/TransomException");
    if (type == nullptr) return;
    const jmethodID make = env->GetMethodID(type, "<init>", "(Ljava/lang/String;)V");
    if (make == nullptr) return;
    env->Throw(static_cast<jthrowable>(env->NewObject(type, make, to_java(env, what))));
}

// Runs `work`. If it throws, Java gets an exception and `otherwise` is returned.
template <typename Value, typename Work>
Value guarded(JNIEnv* env, Value otherwise, Work work) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        raise(env, "There is not enough memory. Close other apps, or export the model with a smaller --context.");
    } catch (const std::exception& error) {
        raise(env, error.what());
    }
    return otherwise;
}

Libraries libraries(JNIEnv* env, jstring onnxruntime, jstring qnn) {
    Libraries found;
    found.onnxruntime = from_java(env, onnxruntime);
    if (const std::filesystem::path folder = from_java(env, qnn); !folder.empty()) {
        found.qnn_provider = folder / "libonnxruntime_providers_qnn.so";
        found.qnn_backend = folder / "libQnnHtp.so";
    }
    return found;
}

}  // namespace

extern "C" {

JNIEXPORT jobjectArray JNICALL Java_dev_transom_edge_Native_judge(JNIEnv* env, jclass, jstring bundle, jstring onnxruntime,
                                                                  jstring qnn) {
    return guarded<jobjectArray>(env, nullptr, [&] {
        const Manifest manifest = read_manifest(from_java(env, bundle));
        const Device device = this_device(libraries(env, onnxruntime, qnn));
        const std::vector<Verdict> verdicts = judge(manifest, device);
        const auto count = static_cast<jsize>(verdicts.size());
        const jobjectArray lines = env->NewObjectArray(count, env->FindClass("java/lang/String"), nullptr);
        for (jsize i = 0; lines != nullptr && i < count; ++i) {
            const Verdict& verdict = verdicts[static_cast<size_t>(i)];
            const std::string cannot = cannot_run(manifest.variants[static_cast<size_t>(i)], device);
            const bool fits = verdict.fits && cannot.empty();
            const std::string& reason = verdict.fits && !fits ? cannot : verdict.reason;
            const jstring line = to_java(env, verdict.variant + (fits ? ": fits. " : ": does not fit. ") + reason);
            if (line == nullptr) return static_cast<jobjectArray>(nullptr);
            env->SetObjectArrayElement(lines, i, line);
            env->DeleteLocalRef(line);
        }
        return lines;
    });
}

JNIEXPORT void JNICALL Java_dev_transom_edge_Native_check(JNIEnv* env, jclass, jstring bundle) {
    guarded(env, 0, [&] {
        check_files(read_manifest(from_java(env, bundle)));
        return 0;
    });
}

JNIEXPORT jlong JNICALL Java_dev_transom_edge_Native_open(JNIEnv* env, jclass, jstring bundle, jstring variant, jint threads,
                                                          jstring onnxruntime, jstring qnn) {
    return guarded<jlong>(env, 0, [&] {
        const Manifest manifest = read_manifest(from_java(env, bundle));
        Settings settings;
        settings.libraries = libraries(env, onnxruntime, qnn);
        settings.threads = threads;
        const std::string name = from_java(env, variant);
        const Variant& chosen =
            name.empty() ? fitting(manifest, this_device(settings.libraries)) : manifest.variant(name);
        const bool has_defaults = manifest.has("generation.json");
        auto model = std::make_unique<Model>(
            Model{Tokenizer::open(manifest.folder / "tokenizer.json"),
                  has_defaults ? read_defaults(manifest.folder / "generation.json") : Defaults(), chosen.name,
                  open_decoder(manifest, chosen, settings)});
        return reinterpret_cast<jlong>(model.release());
    });
}

JNIEXPORT jstring JNICALL Java_dev_transom_edge_Native_variant(JNIEnv* env, jclass, jlong handle) {
    return guarded<jstring>(env, nullptr, [&] { return to_java(env, reinterpret_cast<Model*>(handle)->variant); });
}

// A negative number means "not set". The sink's `onText` gets each piece of text; returning false ends the answer.
JNIEXPORT jstring JNICALL Java_dev_transom_edge_Native_generate(JNIEnv* env, jclass, jlong handle, jstring prompt,
                                                                jboolean rendered, jint max_tokens, jdouble temperature,
                                                                jint top_k, jdouble top_p, jlong seed, jobject sink) {
    return guarded<jstring>(env, nullptr, [&] {
        Model& model = *reinterpret_cast<Model*>(handle);
        const jmethodID on_text = env->GetMethodID(env->GetObjectClass(sink), "onText", "(Ljava/lang/String;)Z");
        if (on_text == nullptr) throw Error("The sink has no method onText", "Pass a Sink");
        Asked asked;
        if (temperature >= 0) asked.temperature = temperature;
        if (top_k >= 0) asked.top_k = top_k;
        if (top_p >= 0) asked.top_p = top_p;
        if (seed >= 0) asked.seed = static_cast<uint64_t>(seed);
        Wanted wanted;
        Encoding how;
        how.add_special = rendered == JNI_FALSE;
        wanted.prompt = model.tokenizer.encode(from_java(env, prompt), how);
        if (max_tokens > 0) wanted.max_tokens = max_tokens;
        wanted.sampling = model.defaults.sampling(asked);
        model.decoder->clear();
        const Answer answer =
            generate(*model.decoder, &model.tokenizer, model.defaults, wanted, [&](int64_t, const std::string& text) {
                const jstring piece = to_java(env, text);
                if (piece == nullptr) return false;
                const bool more = env->CallBooleanMethod(sink, on_text, piece) != JNI_FALSE;
                env->DeleteLocalRef(piece);
                return more && !env->ExceptionCheck();
            });
        return env->ExceptionCheck() ? nullptr : to_java(env, answer.reason);
    });
}

JNIEXPORT void JNICALL Java_dev_transom_edge_Native_close(JNIEnv*, jclass, jlong handle) {
    delete reinterpret_cast<Model*>(handle);
}

}  // extern "C"
