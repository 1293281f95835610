"""Generation with a loaded session: engine, scheduling, sampling, streams, guided output, and `Model`.

Independent of how a model is prepared and loaded."""
