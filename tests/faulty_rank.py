"""A rank that does its work, until it does not: `python faulty_rank.py HOW FD ...`."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from moecore.assembly import Assembly
from moecore.expert_parallel import agreement, worker
from moecore.expert_parallel.rank import GroupRunner, Rank

_LAST_PASS = 3


def in_a_pass(what):
    """Do that within the pass of the number above, before this rank's first layer."""
    run = GroupRunner.run

    def faulty(self, batch):
        if self.num_passes + 1 == _LAST_PASS:
            what()
        return run(self, batch)

    GroupRunner.run = faulty


def before_loading(what):
    load = Assembly.load

    def faulty(self, **options):
        what()
        return load(self, **options)

    Assembly.load = faulty


def with_options(**changes):
    serve = worker.Worker.serve

    def faulty(self, options, *rest):
        serve(self, replace(options, **changes), *rest)

    worker.Worker.serve = faulty


def after_its_pass(what):
    run_pass = Rank.run_pass

    def faulty(self, number):
        outputs = run_pass(self, number)
        if number == _LAST_PASS:
            what()
        return outputs

    Rank.run_pass = faulty


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def fail():
    raise torch.OutOfMemoryError("no memory for the keys of 3 sequences")


def other_instruction_set():
    facts = agreement.facts_of
    agreement.facts_of = lambda *given: {**facts(*given), "instruction set": "abacus"}


_FAULTS = {
    "fails in a pass": lambda _: in_a_pass(fail),
    "is killed in a pass": lambda _: in_a_pass(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "stops in a pass": lambda _: in_a_pass(stop),
    "stops after its pass": lambda _: after_its_pass(stop),
    "stops at once": lambda _: stop(),
    "stops before loading": lambda _: before_loading(stop),
    "fails to load": lambda _: before_loading(fail),
    "exits before loading": lambda _: before_loading(lambda: os._exit(3)),
    "is slow to load": lambda _: before_loading(lambda: time.sleep(2.0)),
    "has another model": lambda folder: with_options(model=folder),
    "has another size": lambda _: with_options(max_num_seqs=7),
    "has another processor": lambda _: other_instruction_set(),
}

if __name__ == "__main__":
    how, descriptor, *_ = sys.argv[1:]
    how, _, folder = how.partition(": ")
    assert folder == "" or Path(folder).is_dir()
    _FAULTS[how](folder)
    worker.main(int(descriptor))
