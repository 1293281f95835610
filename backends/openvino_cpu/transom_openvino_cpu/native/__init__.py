"""Native decoders: a program of a dozen operators over packed weights and a paged cache.

`transom.programs.reading` reads a neutral graph, `lowering` fuses operators and writes a `program`, `packing` writes
the weights in the `layout` that the library reads in place, and `engine` runs them. The library is compiled from `src`
when the package is built, once per instruction set.
"""
