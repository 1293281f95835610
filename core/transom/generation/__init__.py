"""What happens with a loaded session: prompts in, tokens and text out. Engine, scheduling, sampling, streams, guided
output, `Model`. Imports nothing of how a model came to be loaded."""
