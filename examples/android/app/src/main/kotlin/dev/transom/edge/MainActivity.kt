package dev.transom.edge

import android.app.Activity
import android.os.Bundle
import android.view.inputmethod.EditorInfo
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import java.io.File
import kotlin.concurrent.thread
import kotlinx.coroutines.Job
import kotlinx.coroutines.MainScope
import kotlinx.coroutines.cancel
import kotlinx.coroutines.launch

/** A prompt, a button, and the streaming answer. The bundle is the folder `bundle` in the app's own files. */
class MainActivity : Activity() {
    private val scope = MainScope()
    private var model: Transom? = null
    private var answering: Job? = null

    private lateinit var prompt: EditText
    private lateinit var button: Button
    private lateinit var output: TextView

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        prompt = EditText(this).apply {
            setText("Why is the sky blue?")
            imeOptions = EditorInfo.IME_ACTION_SEND
        }
        button = Button(this).apply {
            text = "Ask"
            isEnabled = false
            setOnClickListener { askOrStop() }
        }
        output = TextView(this).apply { setTextIsSelectable(true) }
        setContentView(
            LinearLayout(this).apply {
                orientation = LinearLayout.VERTICAL
                fitsSystemWindows = true
                setPadding(32, 32, 32, 32)
                addView(prompt)
                addView(button)
                addView(ScrollView(this@MainActivity).apply { addView(output) })
            },
        )
        scope.launch { open() }
    }

    private suspend fun open() {
        val bundle = File(getExternalFilesDir(null), "bundle")
        try {
            output.text = Transom.judge(this, bundle).joinToString("\n")
            model = Transom.open(this, bundle).also { output.append("\n${it.variant} is ready.\n") }
            button.isEnabled = true
        } catch (error: TransomException) {
            output.append("\n${error.message}")
        }
    }

    private fun askOrStop() {
        answering?.let {
            it.cancel()
            return
        }
        val open = model ?: return
        output.text = ""
        button.text = "Stop"
        answering = scope.launch {
            try {
                // Text without a chat template. An app for conversations renders the model's template around it, and
                // passes Answering(rendered = true).
                open.stream(prompt.text.toString(), Answering(maxTokens = 256)).collect { output.append(it) }
            } catch (error: TransomException) {
                output.append("\n${error.message}")
            } finally {
                answering = null
                button.text = "Ask"
            }
        }
    }

    override fun onDestroy() {
        scope.cancel()
        model?.let { thread { it.close() } } // waits for an answer to end, which the main thread must not do
        super.onDestroy()
    }
}
