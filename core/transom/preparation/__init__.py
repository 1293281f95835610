"""From a graph to an artifact that is believed: the child process, lowering, compiling, the self-check, the memory
plan."""
