"""`python -m moecore`: what this build holds, and what it chose on this machine."""

import torch

import moecore


def main() -> None:
    info = moecore.build_info()
    cuda = f"yes, toolkit {info['cuda_version']}" if info["has_cuda"] else "no"
    print(f"moecore {info['version']}, torch {torch.__version__}")
    print(f"CUDA kernels: {cuda}; GPUs that torch sees: {torch.cuda.device_count()}")
    print(f"CPU instruction sets: {', '.join(info['cpu_isas'])}; in use: {info['cpu_isa']}")
    print(f"CPU threads: {moecore.num_threads()}")


if __name__ == "__main__":
    main()
