package dev.transom.edge

/** Takes the pieces of an answer. */
internal fun interface Sink {
    /** False ends the answer. */
    fun onText(text: String): Boolean
}

/**
 * The functions of `transom_jni.cpp`, by the same names.
 *
 * `onnxruntime` is the path of its library; empty: as the system finds it. `qnn` is the folder of its QNN provider and of
 * Qualcomm's libraries; empty: QNN is built into ONNX Runtime, if at all. Numbers below zero are not asked for.
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
