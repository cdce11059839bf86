"""moecore beside its peers, in one process and one run.

    python bench/compare.py layer ...   one layer's experts: transformers' implementations
    python bench/compare.py layer --device cuda ...   the same on a GPU, and torch's operators
    python bench/compare.py model ...   whole models: transformers and, if installed, llama.cpp
    python bench/compare.py model --device cuda ...   decode on a GPU, random weights
    python bench/compare.py ranks ...   whole models on several ranks of this machine

`pip install "moecore[bench]"` brings transformers. `pip install "moecore[llama-cpp]"` compiles
llama.cpp for this machine, in some ten minutes on two cores.
`--help` after a word shows its options.
"""

import sys


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in ("layer", "model", "ranks"):
        sys.exit(__doc__)
    command = sys.argv.pop(1)
    on_gpu = sys.argv[1:3] == ["--device", "cuda"]
    if on_gpu:
        del sys.argv[1:3]
    if command == "layer" and on_gpu:
        import compare_layer_cuda as chosen
    elif command == "layer":
        import compare_layer as chosen
    elif on_gpu:
        import compare_model_cuda as chosen
    elif command == "ranks":
        import compare_ranks as chosen
    else:
        import compare_model as chosen
    chosen.main()


if __name__ == "__main__":
    main()
