import dev.transom.edge.Native;
import dev.transom.edge.Sink;
import dev.transom.edge.TransomException;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;

/** Calls the bridge as the Kotlin classes do: library, bundle, ONNX Runtime, prompt, damaged bundle; prints one line for each answer. */
public class Probe {
    public static void main(String[] words) throws Exception {
        PrintStream out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
        System.load(words[0]);
        String bundle = words[1];
        String onnxruntime = words[2];
        for (String line : Native.judge(bundle, onnxruntime, "")) out.println("judge " + line);
        Native.check(bundle);
        long handle = Native.open(bundle, "", 1, onnxruntime, "");
        out.println("variant " + Native.variant(handle));
        for (int turn = 0; turn < 2; ++turn) {
            StringBuilder text = new StringBuilder();
            Sink sink = piece -> text.append(piece) != null;
            String reason = Native.generate(handle, words[3], false, 12, -1, -1, -1, -1, sink);
            out.println("answer " + reason + " " + text);
        }
        int[] calls = {0};
        String reason = Native.generate(handle, words[3], true, 12, -1, -1, -1, -1, piece -> ++calls[0] < 3);
        out.println("stopped " + reason + " " + calls[0]);
        try {
            Native.generate(handle, words[3], false, 12, -1, -1, -1, -1, piece -> {
                throw new IllegalStateException("of the sink");
            });
        } catch (IllegalStateException error) {
            out.println("passed on " + error.getMessage());
        }
        try {
            Native.generate(handle, words[3], false, 12, 1000, -1, -1, -1, piece -> true);
        } catch (TransomException error) {
            out.println("refused " + error.getMessage());
        }
        Native.close(handle);
        try {
            Native.open("/nowhere/\uD83D\uDE42", "", 0, onnxruntime, "");
        } catch (TransomException error) {
            out.println("refused " + error.getMessage());
        }
        try {
            Native.check(words[4]);
        } catch (TransomException error) {
            out.println("refused " + error.getMessage());
        }
    }
}
