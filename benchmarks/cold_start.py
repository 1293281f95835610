"""The stages from the start of a process to the first token, with the compiled model in the cache and without.

    python benchmarks/cold_start.py                         # in the environment of `make bench`
    python benchmarks/cold_start.py --model model.gguf --runs 9 --out result.json

The stages are those of `transom bench --startup`. Every start has its own process; the table shows medians.
"""

from __future__ import annotations

import argparse
from typing import Any

from models import sample_model
from parts.results import add_out, finish, result
from tables_parts.starts import stages

from transom.cli.startup import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind")
    add_out(parser)
    options = parser.parse_args()

    def tell(stage: str, share: Any) -> None:
        print(stage, flush=True)

    rows = []
    for cache in ("warm", "empty"):
        found = measure(
            options.model or sample_model(), {"device": "auto", "backend": "auto"}, runs=options.runs,
            empty_cache=cache == "empty", tell=tell,
        )  # fmt: skip
        rows += [{"cache": cache, **starts} for starts in found["all"]]
    made = result({"starts": rows}, "openvino")
    finish(made, options.out, stages([made]))


if __name__ == "__main__":
    main()
