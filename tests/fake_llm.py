"""Stands for moecore.llm in tests of the command line: an LLM that answers by rote.

Run as a program, it is the command line on that LLM.
"""

import sys
import time
import types

from moecore.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


class FakeTokenizer:
    chat_template = object()


class LLM:
    """Completes with `answer`, one word a step; `calls` records what it was asked."""

    answer = "there was a fox.\nThe end"
    error: BaseException | None = None  # raised after the first word
    load_error: Exception | None = None
    tokenizer = FakeTokenizer()
    calls: list = []  # noqa: RUF012

    def __init__(self, model=None, **options):
        if self.load_error is not None:
            raise self.load_error
        self.calls.append(("load", model, options))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.calls.append(("close",))

    def stream(self, prompt, sampling_params=None):
        self.calls.append(("stream", prompt, sampling_params))
        start = time.monotonic()
        words = [word + " " for word in self.answer.split(" ")]
        words[-1] = words[-1][:-1]
        for count in range(1, len(words) + 1):
            done = count == len(words)
            text = "".join(words[:count])
            metrics = RequestMetrics(start, start + 0.5, start + 1.5 if done else None)
            completion = CompletionOutput(
                0, text, list(range(count)), finish_reason="length" if done else None
            )
            yield RequestOutput("0", "p", [1, 2, 3], [completion], done, metrics)
            if self.error is not None:
                raise self.error

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        self.calls.append(("generate", prompts, sampling_params))
        [*_, last] = self.stream(prompts[0], sampling_params)
        logprobs = [{5: Logprob(-0.5, 1)}]
        outputs = [
            CompletionOutput(i, self.answer, [5], -0.5, logprobs, "stop", "\n")
            for i in range(sampling_params.n)
        ]
        return [RequestOutput("0", prompts[0], [1, 2, 3], outputs, True, last.metrics)]

    def chat_prompt(self, messages):
        self.calls.append(("chat", [dict(message) for message in messages]))
        return {"prompt": "chat", "prompt_token_ids": [1]}


def module():
    fake = types.ModuleType("moecore.llm")
    fake.LLM = LLM
    return fake


if __name__ == "__main__":
    from moecore.cli import main

    sys.modules["moecore.llm"] = module()
    LLM.answer = "word " * 100_000
    sys.exit(main())
