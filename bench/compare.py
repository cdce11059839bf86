"""moecore beside its peers, in one process and one run.

    python bench/compare.py layer ...   one layer's experts: transformers' implementations
    python bench/compare.py model ...   whole models: transformers and, if installed, llama.cpp

`pip install "moecore[bench]"` brings transformers. `pip install "moecore[llama-cpp]"` compiles
llama.cpp for this machine, in some ten minutes on two cores.
`--help` after either word shows its options.
"""

import sys


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in ("layer", "model"):
        sys.exit(__doc__)
    command = sys.argv.pop(1)
    if command == "layer":
        import compare_layer as chosen
    else:
        import compare_model as chosen
    chosen.main()


if __name__ == "__main__":
    main()
