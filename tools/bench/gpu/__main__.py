"""python -m tools.bench.gpu kernels|serve|transformers ...: started by tools/bench/bench."""

import sys

from . import kernels


def main(command: list[str]) -> int:
    if command[:1] == ["serve"]:
        from . import serve

        return serve.main(command)
    if command[:1] == ["transformers"]:
        from . import transformers_bench

        return transformers_bench.main(command)
    return kernels.main(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
