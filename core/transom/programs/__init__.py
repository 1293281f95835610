"""A decoder graph as a program: operators over rows of numbers, one row for each token, in the order they run.

For backends whose kernels do what a decoder needs: `Drafting` reads the neutral graph, which has some dozen small nodes
for each layer, into the few operators that such an engine has; the passes of `transom.programs.fusing` put together
what can be made together. What an engine has kernels for, it says in a `Kernels`. A program is all or nothing, since
every border between two engines costs a copy of the activations: the first node without an operator is the reason.
"""
