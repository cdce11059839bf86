"""Where a launcher has put this process: its rank, and the address at which the ranks meet."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_FIRST_PORT, _NUM_PORTS = 20000, 20000  # of Slurm steps, by their job's number


@dataclass(frozen=True)
class Launch:
    """One process of a group that torchrun, Slurm or Ray has started.

    `key` differs between groups that meet at one address. Where the launcher serves the store at
    the address itself (torchrun does), no rank has to.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    key: str
    has_store: bool = False


def launch_from_environment(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return this process's place, or None if no launcher started several.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT count first (torchrun, Ray); in a step
    that srun started, Slurm's own variables stand for those that are not set.

    Raises:
        ValueError: a variable is missing or out of range; the message names it.
    """
    given = dict(environment)
    if int(_number(given, "SLURM_STEP_NUM_TASKS", 1, default="1")) > 1:
        given = _of_slurm(given) | given
    if "WORLD_SIZE" not in given or (size := _number(given, "WORLD_SIZE", 1)) == 1:
        return None
    rank = _number(given, "RANK", 0, size - 1)
    if "MASTER_ADDR" not in given:
        raise _fail("MASTER_ADDR", "the host of rank 0", None)
    return Launch(
        rank=rank,
        size=size,
        local_rank=_number(given, "LOCAL_RANK", 0, size - 1, default=str(rank)),
        address=given["MASTER_ADDR"],
        port=_number(given, "MASTER_PORT", 1, 65535),
        key="-".join(
            given.get(name, "0") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        ),
        has_store=given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _of_slurm(given: Mapping[str, str]) -> dict[str, str]:
    job = _number(given, "SLURM_JOB_ID", 0, default="0")
    step = _number(given, "SLURM_STEP_ID", 0, default="0")
    names = {
        "RANK": "SLURM_PROCID",
        "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
        "LOCAL_RANK": "SLURM_LOCALID",
    }
    found = {name: given[slurm] for name, slurm in names.items() if slurm in given}
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST")
    if nodes:
        found["MASTER_ADDR"] = first_node(nodes)
    return found | {"MASTER_PORT": str(_FIRST_PORT + (job * 8 + step) % _NUM_PORTS)}


def first_node(nodes: str) -> str:
    """Return the first host of a Slurm list: "node[03-05,09],gpu1" begins with "node03"."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None  # every part may be empty
    return match[1] + (match[2] or "") + (match[3] or "")


def _number(
    given: Mapping[str, str],
    name: str,
    low: int,
    high: int | None = None,
    default: str | None = None,
) -> int:
    text = given.get(name, default)
    rule = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    try:
        value = int(text) if text is not None else None
    except ValueError:
        value = None
    if value is None or value < low or (high is not None and value > high):
        raise _fail(name, rule, text)
    return value


def _fail(name: str, rule: str, value: str | None) -> ValueError:
    got = "nothing" if value is None else repr(value)
    return ValueError(f"LLM: environment variable {name} must be {rule}, got {got}")
