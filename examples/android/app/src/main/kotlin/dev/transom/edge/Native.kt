package dev.transom.edge

/** Receives the pieces of an answer. */
internal fun interface Sink {
    /** Returning false ends the answer. */
    fun onText(text: String): Boolean
}

/**
 * The functions of `transom_jni.cpp`, with the same names.
 *
 * `onnxruntime` is the path of its library; empty: the system finds it. `qnn` is the folder of its QNN provider and of
 * Qualcomm's libraries; empty: QNN is built into ONNX Runtime or missing. A number below zero means "not set".
 */
internal object Native {
    @JvmStatic
    external fun judge(bundle: String, onnxruntime: String, qnn: String): Array<String>

    @JvmStatic
    external fun check(bundle: String)

    @JvmStatic
    external fun open(bundle: String, variant: String, threads: Int, onnxruntime: String, qnn: String): Long

    @JvmStatic
    external fun variant(handle: Long): String

    @JvmStatic
    external fun generate(
        handle: Long,
        prompt: String,
        rendered: Boolean,
        maxTokens: Int,
        temperature: Double,
        topK: Int,
        topP: Double,
        seed: Long,
        sink: Sink,
    ): String

    @JvmStatic
    external fun close(handle: Long)
}
