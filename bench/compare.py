"""moecore beside its peers, in one process and one run.

    python bench/compare.py layer ...   one layer's experts: transformers' implementations
    python bench/compare.py model ...   whole models: transformers and, if installed, llama.cpp
    python bench/compare.py ranks ...   whole models on several ranks of this machine

`--help` after a word shows its options.
"""

import sys


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in ("layer", "model", "ranks"):
        sys.exit(__doc__)
    command = sys.argv.pop(1)
    if command == "layer":
        import compare_layer as chosen
    elif command == "ranks":
        import compare_ranks as chosen
    else:
        import compare_model as chosen
    chosen.main()


if __name__ == "__main__":
    main()
