"""Decoders in code of our own: a program of a dozen operators over packed weights and a paged cache.

`drafting` reads a neutral graph, `fusing` joins what can be made together, `lowering` makes a `program` of it and
`packing` puts its weights into the form that the library reads in place; `engine` runs both. The library is compiled
from `src` when the package is built, once for each instruction set.
"""
