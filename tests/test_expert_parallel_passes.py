"""What the ranks of a group agree on before a pass: whether all run a CUDA graph, and which."""

import threading

import pytest
import torch

import moecore
from moecore.expert_parallel.rank import GroupRunner


class Runner:
    """Notes what it is told; a batch is the number of its decodes, -1 for another kind."""

    block_size, num_blocks, vocab_size, max_model_len = 16, 1, 3, 8

    def __init__(self, has_graphs):
        self.has_graphs = has_graphs
        self.told = []

    def num_decodes(self, batch):
        return batch

    def run(self, batch, most_decodes):
        self.told.append(("run", batch, most_decodes))
        return torch.zeros(1)

    def join(self, most_decodes):
        self.told.append(("join", most_decodes))


def told(batches, has_graphs=True):
    """What each rank's runner is told in a pass with these batches; None joins."""
    transports = moecore.Transport.in_process(len(batches))
    runners = [Runner(has_graphs) for _ in batches]
    groups = [GroupRunner(r, t) for r, t in zip(runners, transports, strict=True)]

    def run(group, batch):
        group.join() if batch is None else group.run(batch)

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(groups, batches, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [group.num_passes for group in groups] == [1] * len(batches)
    return [runner.told[0] for runner in runners]


@pytest.mark.parametrize(
    ("batches", "most"),
    [([3, 5, 1], 5), ([3, None, 1], 3), ([3, -1, 1], -1), ([None, -1, None], -1)],
)
def test_all_ranks_run_the_same_graph_or_none(batches, most):
    assert told(batches) == [
        ("join", most) if batch is None else ("run", batch, most) for batch in batches
    ]


def test_without_graphs_nothing_is_agreed_on():
    assert told([3, None], has_graphs=False) == [("run", 3, -1), ("join", -1)]


def test_fixed_tokens_end_with_their_context():
    (transport,) = moecore.Transport.in_process(1)
    assert not transport.can_capture
    fixed = []
    transport.native = type("Native", (), {"fix_tokens": lambda self, n: fixed.append(n)})()
    with pytest.raises(KeyError), transport.fixed_tokens(8):
        raise KeyError
    assert fixed == [8, 0]
