"""From a graph to a verified artifact: the child process, lowering, compiling, the self-check, the memory plan."""
