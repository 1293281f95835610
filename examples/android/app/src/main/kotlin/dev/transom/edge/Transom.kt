package dev.transom.edge

import android.content.Context
import android.system.Os
import java.io.File
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.channels.Channel
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.buffer
import kotlinx.coroutines.flow.channelFlow
import kotlinx.coroutines.flow.filter
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.isActive
import kotlinx.coroutines.runBlocking
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import kotlinx.coroutines.withContext

/** One sentence of cause, and one of what to do. */
class TransomException(message: String) : Exception(message)

/** Options of an answer; the bundle's `generation.json` gives the defaults. */
data class Answering(
    /** The prompt is a rendered chat template, which already has its beginning tokens. */
    val rendered: Boolean = false,
    val maxTokens: Int? = null,
    val temperature: Double? = null,
    val topK: Int? = null,
    val topP: Double? = null,
    val seed: Long? = null,
)

/**
 * A bundle from `transom export`, opened on this phone. It generates one answer at a time; others wait.
 */
class Transom private constructor(private var handle: Long) : AutoCloseable {
    private val turn = Mutex()

    /** The variant that runs, such as `qnn-snapdragon-8-gen-2`. */
    val variant: String = Native.variant(handle)

    /** The answer to a prompt, piece by piece. It ends when collecting stops. */
    fun stream(prompt: String, how: Answering = Answering()): Flow<String> = channelFlow {
        turn.withLock {
            check(handle != 0L) { "The model is closed" }
            Native.generate(
                handle,
                prompt,
                how.rendered,
                how.maxTokens ?: -1,
                how.temperature ?: -1.0,
                how.topK ?: -1,
                how.topP ?: -1.0,
                how.seed ?: -1,
            ) { text -> isActive && trySend(text).isSuccess }
        }
    }
        .buffer(Channel.UNLIMITED) // the computing thread waits neither for the screen nor for a stopped collector
        .flowOn(Dispatchers.Default)
        .filter { it.isNotEmpty() }

    /** Frees the memory. Waits for a running answer to end. */
    suspend fun release() = turn.withLock {
        if (handle != 0L) Native.close(handle)
        handle = 0
    }

    override fun close() = runBlocking { release() }

    companion object {
        @Volatile private var loaded = false

        /** Whether this phone can run each variant of a bundle, and why, from its manifest alone. */
        suspend fun judge(context: Context, bundle: File): List<String> = withContext(Dispatchers.IO) {
            load(context)
            Native.judge(bundle.path, "", libraries(context)).toList()
        }

        /** Compare every file of a bundle with its manifest. Do it once, after copying it to the phone. */
        suspend fun checkFiles(context: Context, bundle: File) = withContext(Dispatchers.IO) {
            load(context)
            Native.check(bundle.path)
        }

        /** Open the first variant that fits this phone, or the named one. Takes seconds. */
        suspend fun open(context: Context, bundle: File, variant: String = "", threads: Int = 0): Transom {
            var opened: Transom? = null
            try {
                return withContext(Dispatchers.IO) {
                    load(context)
                    Transom(Native.open(bundle.path, variant, threads, "", libraries(context))).also { opened = it }
                }
            } catch (stopped: CancellationException) {
                opened?.close() // opening finished anyway, and nobody else would close it
                throw stopped
            }
        }

        @Synchronized
        private fun load(context: Context) {
            if (loaded) return
            // Where the DSP looks for its skeleton. A process reads it once, when it first uses the DSP. One folder is
            // the safe form; ";" separates several, and ":" would be part of a name.
            Os.setenv("ADSP_LIBRARY_PATH", libraries(context), true)
            System.loadLibrary("transom_jni")
            loaded = true
        }

        private fun libraries(context: Context): String = context.applicationInfo.nativeLibraryDir
    }
}
