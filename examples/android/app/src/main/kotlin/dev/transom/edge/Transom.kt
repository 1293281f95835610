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

/** One sentence of what went wrong, and one of what to do. */
class TransomException(message: String) : Exception(message)

/** How an answer is made; what is left out is as the bundle's `generation.json` says. */
data class Answering(
    /** The prompt is a rendered chat template, which holds its beginning tokens already. */
    val rendered: Boolean = false,
    val maxTokens: Int? = null,
    val temperature: Double? = null,
    val topK: Int? = null,
    val topP: Double? = null,
    val seed: Long? = null,
)

/**
 * A bundle that `transom export` wrote, opened on this phone. One answer is made at a time; others wait.
 */
class Transom private constructor(private var handle: Long) : AutoCloseable {
    private val turn = Mutex()

    /** The variant that runs, such as `qnn-snapdragon-8-gen-2`. */
    val variant: String = Native.variant(handle)

    /** The answer to a prompt, piece by piece as it comes. Whoever stops collecting ends it. */
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
        .buffer(Channel.UNLIMITED) // the thread that computes never waits for the screen, nor for who has stopped looking
        .flowOn(Dispatchers.Default)
        .filter { it.isNotEmpty() }

    /** Gives the memory back. Waits for an answer that is being made. */
    suspend fun release() = turn.withLock {
        if (handle != 0L) Native.close(handle)
        handle = 0
    }

    override fun close() = runBlocking { release() }

    companion object {
        @Volatile private var loaded = false

        /** Whether each variant of a bundle is good on this phone, and why, from its manifest alone. */
        suspend fun judge(context: Context, bundle: File): List<String> = withContext(Dispatchers.IO) {
            load(context)
            Native.judge(bundle.path, "", libraries(context)).toList()
        }

        /** Compare every file of a bundle with its manifest: once, after it was copied to the phone. */
        suspend fun checkFiles(context: Context, bundle: File) = withContext(Dispatchers.IO) {
            load(context)
            Native.check(bundle.path)
        }

        /** Open the first variant that fits this phone, or the one that is named. Takes seconds. */
        suspend fun open(context: Context, bundle: File, variant: String = "", threads: Int = 0): Transom {
            var opened: Transom? = null
            try {
                return withContext(Dispatchers.IO) {
                    load(context)
                    Transom(Native.open(bundle.path, variant, threads, "", libraries(context))).also { opened = it }
                }
            } catch (stopped: CancellationException) {
                opened?.close() // it was opened all the same, and nobody would close it
                throw stopped
            }
        }

        @Synchronized
        private fun load(context: Context) {
            if (loaded) return
            // Where the DSP looks for its skeleton. It is read once in a process, when the DSP is first used. One
            // folder is the safe form; several are put side by side with ";", and ":" makes one name of them.
            Os.setenv("ADSP_LIBRARY_PATH", libraries(context), true)
            System.loadLibrary("transom_jni")
            loaded = true
        }

        private fun libraries(context: Context): String = context.applicationInfo.nativeLibraryDir
    }
}
