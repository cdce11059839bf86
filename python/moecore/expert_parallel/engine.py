"""An engine over several ranks: each runs its share of the requests, all step together."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from moecore._core import TransportError
from moecore.engine import Engine
from moecore.expert_parallel import codec
from moecore.expert_parallel.group import Group, in_context
from moecore.expert_parallel.interrupts import deferred_interrupts
from moecore.expert_parallel.rank import Rank
from moecore.outputs import RequestOutput
from moecore.request import Request
from moecore.sampling_params import SamplingParams


class _Assigned(NamedTuple):
    request: Request
    rank: int


class ExpertParallelEngine:
    """What `Engine` is, on all ranks of a group; made on rank 0 by `launch.start`.

    A request goes to the rank with the fewest unfinished completions, the first among equals. It
    has the tokens that it would have on one rank: its seed depends on its place in the order of
    arrival, and its logits on nothing but itself.

    If a rank is lost, or fails within a pass, the group has ended: `step` raises, no process is
    left, and every further call raises. An error outside of a pass (in sampling) aborts all
    unfinished requests, and the engine is ready for new ones. Ctrl-C takes effect between passes.

    Args:
        rank: rank 0's own, started.
        engine: rank 0's own.
        group: the other ranks, waiting for work; closed with this engine.
    """

    def __init__(self, rank: Rank, engine: Engine, group: Group) -> None:
        self._rank = rank
        self._engine = engine
        self._group = group
        self._unfinished: dict[str, _Assigned] = {}
        self._undelivered: list[RequestOutput] = []
        self._num_requests = 0
        self._num_passes = 0
        self._failure: str | None = None
        self._ending = _Ending(rank, group)
        self._close = weakref.finalize(self, self._ending)

    @property
    def has_unfinished(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._unfinished or self._undelivered)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether this request waits or runs."""
        undelivered = any(output.request_id == request_id for output in self._undelivered)
        return request_id in self._unfinished or undelivered

    def rank_of(self, request_id: str) -> int:
        """The rank that runs an unfinished request."""
        return self._unfinished[request_id].rank

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        prompt: str | None = None,
        *,
        stream: bool = True,
    ) -> None:
        """Queue a request; arguments and errors as in `Engine.add_request`."""
        self._check_open()
        if request_id in self._unfinished:
            raise ValueError(
                "Engine.add_request: request_id must not be that of an unfinished request, "
                f"got {request_id!r}"
            )
        request = self._engine.make_request(
            request_id,
            prompt_token_ids,
            params,
            prompt,
            stream=stream,
            number=self._num_requests,
        )
        rank = self._least_busy()
        if rank == 0:
            self._engine.queue(request)
        else:
            self._hand_over(rank, request, params, stream)
        self._num_requests += 1
        self._unfinished[request_id] = _Assigned(request, rank)

    def step(self) -> list[RequestOutput]:
        """Run one pass on every rank; returns and raises as `Engine.step`.

        Raises:
            TransportError: a rank was lost; the message names it. The group has ended.
            Exception: whatever a rank raised.
        """
        self._check_open()
        if self._unfinished and not self._undelivered:
            with deferred_interrupts():
                self._undelivered = self._pass()
        outputs, self._undelivered = self._undelivered, []
        return outputs

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request at once; as `Engine.abort_request`."""
        self._undelivered = [o for o in self._undelivered if o.request_id != request_id]
        assigned = self._unfinished.pop(request_id, None)
        if assigned is None or self._failure is not None or not self._close.alive:
            return None
        if assigned.rank == 0:
            return self._engine.abort_request(request_id)
        phase = "as a request was ended"
        try:
            with deferred_interrupts():
                self._group.send(assigned.rank, "abort", phase, id=request_id)
                answer = self._group.receive(assigned.rank, "aborted", phase)
        except Exception as error:
            self._end(error, phase)
        return None if answer["output"] is None else self._decode(answer["output"], assigned)

    def close(self) -> None:
        """End all ranks; further calls raise RuntimeError."""
        self._close()
        self._unfinished.clear()

    def _hand_over(self, rank: int, request: Request, params: SamplingParams, stream: bool) -> None:
        phase = "as it got a request"
        try:
            with deferred_interrupts():
                self._group.send(
                    rank,
                    "add",
                    phase,
                    id=request.request_id,
                    prompt_token_ids=request.prompt_token_ids,
                    params=codec.encode_params(params),
                    stream=stream,
                    number=self._num_requests,
                )
        except Exception as error:
            self._end(error, phase)

    def _pass(self) -> list[RequestOutput]:
        self._num_passes += 1
        number, phase = self._num_passes, f"in pass {self._num_passes}"
        failure: Exception | None = None
        outputs: list[RequestOutput] = []
        try:
            for rank in self._group.ranks:
                self._group.send(rank, "step", phase, number=number)
            try:
                outputs = self._rank.run_pass(number)
            except Exception as error:
                if not self._rank.has_run(number):
                    raise
                failure = error
            for rank in self._group.ranks:
                answer = self._group.receive(rank, "done", phase)
                if answer["error"] is not None:
                    failure = failure or codec.decode_error(answer["error"], rank, phase)
                outputs += [
                    self._decode(o, self._unfinished[o["request_id"]]) for o in answer["outputs"]
                ]
        except BaseException as error:
            self._end(error, phase)
        if failure is not None:
            for request_id in list(self._unfinished):
                self.abort_request(request_id)
            raise failure
        for output in outputs:
            if output.finished:
                del self._unfinished[output.request_id]
        return outputs

    def _end(self, error: BaseException, phase: str) -> NoReturn:
        """End the group after an error, and raise what caused it."""
        self._rank.transport.abort(f"{type(error).__name__}: {error}")
        cause: BaseException = error
        if isinstance(error, TransportError):
            cause = self._group.cause(phase) or in_context(error, phase)
        self._failure = str(cause) or type(cause).__name__
        self._unfinished.clear()
        self._ending.reason = self._failure
        self._close()
        raise cause

    def _least_busy(self) -> int:
        load = dict.fromkeys([0, *self._group.ranks], 0)
        for request, rank in self._unfinished.values():
            load[rank] += len(request.completions)
        return min(load, key=lambda rank: (load[rank], rank))

    def _decode(self, values: codec.Values, assigned: _Assigned) -> RequestOutput:
        request = assigned.request
        return codec.decode_output(
            values, request.prompt, request.prompt_token_ids, request.arrival_time
        )

    def _check_open(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"LLM: the ranks have ended after an error; make a new LLM. It was: {self._failure}"
            )
        if not self._close.alive:
            raise RuntimeError("LLM: the model is closed")


class _Ending:
    """Ends the ranks, at the latest when the engine is gone or the interpreter ends."""

    def __init__(self, rank: Rank, group: Group) -> None:
        self._rank = rank
        self._group = group
        self._owner = os.getpid()
        self.reason: str | None = None

    def __call__(self) -> None:
        if os.getpid() == self._owner:  # and not in a fork of the ranks' owner
            self._group.close(self.reason)
            self._rank.close()
