"""LLM: load a checkpoint, generate text."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from inspect import signature
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tqdm import tqdm

from moecore.assembly import Assembly, EngineOptions, plain_name
from moecore.config import ModelConfig
from moecore.engine import Engine
from moecore.expert_parallel.options import GroupOptions
from moecore.keywords import reject_unknown
from moecore.outputs import RequestOutput
from moecore.sampling_params import SamplingParams
from moecore.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moecore.expert_parallel.engine import ExpertParallelEngine

Prompt: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"
Message: TypeAlias = Mapping[str, Any]


class LLM:
    """A loaded model, its tokenizer and the engine that batches requests on it.

    Args:
        model: a checkpoint folder or a hub id; None is the model bundled with moecore.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is CUDA if this build has its kernels and torch
            sees a GPU, else the CPU.
        dtype: "float32" or "bfloat16", of weights, activations and cache; "auto": the checkpoint's.
        max_model_len: tokens of a prompt and its completion; None is the model's own limit, or less
            if the cache cannot hold that many.
        max_num_seqs: sequences that run at a time; others wait.
        max_num_batched_tokens: tokens of one forward pass, at least max_num_seqs; longer prompts
            are cut into chunks.
        kv_cache_memory: bytes for keys and values; None is what max_num_seqs sequences can need, at
            most 4 GiB on the CPU and 80 % of the free memory of a GPU. Pages that no sequence has
            reached are not touched.
        load_format: "auto" reads the checkpoint's weights; "dummy" makes random ones (for timing).
        revision: branch, tag or commit of a hub id.
        seed: of requests that bring none.
        enforce_eager: on CUDA, launch decode passes kernel by kernel, and not as CUDA graphs:
            slower, but starts sooner and takes less memory. Ranks of a group always do.
        expert_parallel_size: ranks that share out the experts; each runs its share of the requests,
            and on the CPU a request's bits do not depend on how many there are. moecore starts the
            other ranks; under torchrun, Slurm or Ray they are the launched processes, of which all
            but rank 0 serve within this call and then exit. On GPUs each rank takes one, by its
            number on its machine. Limits of sequences, tokens and memory hold for each rank.
        expert_parallel_backend: "processes", or "threads" of this process, which share its
            processors or its GPU (for tests).
        expert_parallel_timeout: seconds of silence after which a rank counts as lost.
        skip_tokenizer_init: run on token ids alone; prompts are then ids, and outputs have no text.
        use_tqdm: show progress while loading.

    Raises:
        FileNotFoundError: the model is neither a folder, nor in the hub's cache, nor to be had.
        moecore.FormatError: a file of the checkpoint is damaged or does not fit the model.
        moecore.UnsupportedError: the family, its quantisation or the device is not implemented.
        moecore.TransportError: a rank was lost; the message says which. Later calls, too, raise it.
        ValueError: an argument is out of range; TypeError: unknown, with the nearest known name.

    Example:
        >>> with moecore.LLM() as llm:
        ...     print(llm.generate("Once upon a time")[0].outputs[0].text)
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        kv_cache_memory: int | None = None,
        load_format: str = "auto",
        revision: str | None = None,
        seed: int = 0,
        enforce_eager: bool = False,
        expert_parallel_size: int = 1,
        expert_parallel_backend: str = "processes",
        expert_parallel_timeout: float = 30.0,
        skip_tokenizer_init: bool = False,
        use_tqdm: bool = True,
        **unknown: Any,
    ) -> None:
        reject_unknown("LLM", unknown, _keywords())
        options = EngineOptions(
            model=None if model is None else str(model),
            device=plain_name(device),
            dtype=plain_name(dtype),
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=kv_cache_memory,
            load_format=load_format,
            revision=revision,
            seed=seed,
            skip_tokenizer_init=skip_tokenizer_init,
            enforce_eager=enforce_eager,
        )
        group = GroupOptions(expert_parallel_size, expert_parallel_backend, expert_parallel_timeout)
        self._engine: Engine | ExpertParallelEngine | None
        if group.size == 1:
            assembly = Assembly(options)
            cache = assembly.load(progress=use_tqdm)
            self._engine = assembly.engine(assembly.runner(cache))
        else:
            from moecore.expert_parallel.launch import start

            self._engine, assembly, cache = start(options, group, progress=use_tqdm)
        self.config: ModelConfig = assembly.config
        self._tokenizer = assembly.tokenizer
        self.device, self.dtype = assembly.device, assembly.dtype
        self.max_model_len = cache.max_model_len
        self._ids = count()
        self._lock = threading.Lock()
        self._latest: dict[str, RequestOutput] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; they run batched. On the CPU a result does not depend on its batch.

        Args:
            prompts: a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}, or
                a list of those.
            sampling_params: one for all, or one a prompt (default: SamplingParams()).
            use_tqdm: show progress.

        Returns:
            One RequestOutput a prompt, in their order.

        Raises:
            ValueError: a prompt is empty, too long, or has ids outside the vocabulary; nothing has
                been started then.
        """
        many = _as_list(prompts)
        params = sampling_params or SamplingParams()
        each = [params] * len(many) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise ValueError(
                f"generate: sampling_params must be one or one a prompt ({len(many)}), "
                f"got {len(each)}"
            )
        ids: list[str] = []
        with tqdm(total=len(many), desc="prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
            try:
                for prompt, wanted in zip(many, each, strict=True):
                    ids.append(self._add(prompt, wanted, stream=False))
                pending = set(ids)
                while pending:
                    self._step(pending)
                    done = {i for i in pending if (r := self._latest.get(i)) and r.finished}
                    pending -= done
                    bar.update(len(done))
                return [self._latest[i] for i in ids]
            finally:
                self._forget(ids)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, and yield the output so far whenever it has grown.

        Closing the iterator ends the request. Arguments and errors as in `generate`.
        """
        request = self._add(prompt, sampling_params or SamplingParams(), stream=True)
        return self._follow(request)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, in the checkpoint's own chat template.

        Args:
            messages: [{"role": "user", "content": "..."}, ...], or a list of such lists.
            sampling_params: as in `generate`.
            use_tqdm: show progress.
            template_variables: passed to the template (such as enable_thinking=False).

        Raises:
            ValueError: the checkpoint has no chat template, or as in `generate`.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [self.chat_prompt(c, **template_variables) for c in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Sequence[Message], **template_variables: Any) -> Prompt:
        """Return the prompt of a conversation, for `generate` or `stream`."""
        text = self.tokenizer.apply_chat_template(list(messages), **template_variables)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError("LLM: a text prompt needs a tokenizer, got skip_tokenizer_init=True")
        return self._tokenizer

    @property
    def engine(self) -> Engine | ExpertParallelEngine:
        """The engine itself, for those who drive its steps."""
        if self._engine is None:
            raise RuntimeError("LLM: the model is closed")
        return self._engine

    def close(self) -> None:
        """Free the model and its cache, and end its ranks; further calls raise RuntimeError."""
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is not None and not isinstance(engine, Engine):
                engine.close()
            self._latest.clear()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, prompt: Prompt, params: SamplingParams, *, stream: bool) -> str:
        text, ids = self._encode(prompt)
        with self._lock:
            request = str(next(self._ids))
            self.engine.add_request(request, ids, params, text, stream=stream)
        return request

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        if isinstance(prompt, Mapping):
            reject_unknown("prompt", prompt, ("prompt", "prompt_token_ids"))
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            return text, self.tokenizer.encode(text or "") if ids is None else list(ids)
        return None, list(prompt)

    def _step(self, waiting: Collection[str]) -> None:
        """Run a pass, unless another thread's has already finished all that `waiting` names."""
        with self._lock:
            unfinished = [i for i in waiting if self.engine.is_unfinished(i)]
            if unfinished:
                self._latest.update((done.request_id, done) for done in self.engine.step())
            for request in waiting:
                output = self._latest.get(request)
                is_done = output is not None and output.finished
                if not is_done and not self.engine.is_unfinished(request):
                    raise RuntimeError(
                        f"LLM: request {request} was aborted: a pass failed in another thread"
                    )

    def _follow(self, request: str) -> Iterator[RequestOutput]:
        seen: RequestOutput | None = None
        try:
            while seen is None or not seen.finished:
                self._step([request])
                output = self._latest.get(request)
                if output is not None and output is not seen:
                    seen = output
                    yield output
        finally:
            self._forget([request])

    def _forget(self, requests: Iterable[str]) -> None:
        """Drop results that were delivered, and end requests that nobody waits for."""
        with self._lock:
            for request in requests:
                output = self._latest.pop(request, None)
                if self._engine is not None and not (output and output.finished):
                    self._engine.abort_request(request)


def generate(prompt: Prompt, model: str | Path | None = None, **options: Any) -> str:
    """Complete one prompt and return the text.

    Args:
        prompt: as in `LLM.generate`.
        model: as in `LLM`: None is the bundled model.
        options: of `SamplingParams` (max_tokens is 128 unless given) and of `LLM`.

    Example:
        >>> moecore.generate("Once upon a time", temperature=0)
    """
    names = {field.name for field in fields(SamplingParams)}
    reject_unknown("generate", options, (*names, *_keywords()))
    sampling = {k: v for k, v in options.items() if k in names}
    engine = {k: v for k, v in options.items() if k not in names}
    if "seed" in sampling:
        engine["seed"] = sampling["seed"]
    params = SamplingParams(**{"max_tokens": 128, **sampling})
    with LLM(model, **{"use_tqdm": False, **engine}) as llm:
        return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text


def _keywords() -> list[str]:
    parameters = signature(LLM).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [items]
    return items
