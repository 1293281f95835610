"""A decoder graph as a program: operators over rows of numbers, one row for each token, in the order they run.

For backends whose kernels do what a decoder needs. `reading.GraphReader` reads the neutral graph, which has some dozen
small nodes for each layer, into the few operators that such an engine has. `fusing` has passes that fuse operators,
`buffers` assigns buffers to values, and `written` stores a program as JSON. An engine describes its kernels in a
`Kernels`. A program is all or nothing, since every border between two engines costs a copy of the activations: the
first node without an operator is the reason.
"""
