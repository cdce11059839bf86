"""Write cuda/common/wgmma_sm90.cuh: one wrapper for each width of the wgmma instruction that the
kernels use. Run it again after a change of WIDTHS.
"""

from pathlib import Path

WIDTHS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192)
HEADER = Path(__file__).parent.parent / "cuda/common/wgmma_sm90.cuh"

PREFACE = """\
#pragma once

// wgmma.mma_async for bfloat16 and float32 sums. Written by scripts/generate_wgmma.py: change that.

#include <cstdint>

namespace moecore::cuda::ptx {

/// sum += A @ B.T for A [64, 16] and B [kN, 16] in shared memory, K contiguous. Asynchronous:
/// between wgmma_fence and wgmma_wait nothing may touch `sum`. It is m64nNk16's fragment: lane l of
/// warp w holds, for each 8 columns j, [4 j + 2 h + i] at row 16 w + 8 h + l / 4 and column
/// 8 j + 2 (l % 4) + i.
template <int kN>
__device__ void wgmma(float* sum, uint64_t a, uint64_t b);

// clang-format off
"""

FUNCTION = """\
template <>
__device__ __forceinline__ void wgmma<{n}>(float* s, uint64_t a, uint64_t b) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{"
{registers}
        "}}, %{a}, %{b}, 1, 1, 1, 0, 0;" :
{operands} :
        "l"(a), "l"(b));
}}
"""


def lines(items: list[str], per_line: int, quote: str) -> str:
    """The items with commas, some a line."""
    rows = [items[i : i + per_line] for i in range(0, len(items), per_line)]
    texts = [", ".join(row) + ("," if row is not rows[-1] else "") for row in rows]
    return "\n".join(f"        {quote}{text}{quote}" for text in texts)


def function(n: int) -> str:
    count = n // 2
    return FUNCTION.format(
        n=n,
        registers=lines([f"%{i}" for i in range(count)], 16, '"'),
        operands=lines([f'"+f"(s[{i}])' for i in range(count)], 6, ""),
        a=count,
        b=count + 1,
    )


def main() -> None:
    body = "".join(function(n) for n in WIDTHS)
    HEADER.write_text(PREFACE + body + "// clang-format on\n\n}  // namespace moecore::cuda::ptx\n")


if __name__ == "__main__":
    main()
