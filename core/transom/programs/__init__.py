"""A decoder graph as a program: operators over rows of numbers, one row per token, in execution order.

For backends with kernels for whole decoder operators. `reading.GraphReader` converts the neutral graph, which has a
dozen small nodes per layer, into the few operators that such an engine has. `fusing` has passes that fuse operators,
`buffers` assigns buffers to values, and `written` stores a program as JSON. An engine describes its kernels in a
`Kernels`. A program covers the whole graph, since every boundary between two engines costs a copy of the activations.
The first node without an operator is reported as the reason for refusal.
"""
