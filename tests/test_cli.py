"""The command line: what goes where, and which exit code says what."""

import io
import json
import os
import subprocess
import sys

import pytest

import fake_llm
from moecore import SamplingParams
from moecore.cli import main
from processes import python


@pytest.fixture
def llm(monkeypatch):
    """The LLM class that commands find; tests may change its attributes."""
    monkeypatch.setitem(sys.modules, "moecore.llm", fake_llm.module())
    monkeypatch.setattr(fake_llm.LLM, "calls", [])
    yield fake_llm.LLM
    for name in ("answer", "error", "load_error", "tokenizer"):
        setattr(fake_llm.LLM, name, DEFAULTS[name])


DEFAULTS = {name: getattr(fake_llm.LLM, name) for name in vars(fake_llm.LLM)}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def usage_error(capsys, *argv):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_help_does_not_wait_for_torch():
    program = (
        "import sys\n"
        "from moecore.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'tokenizers', 'rich', 'moecore._core'}\n"
        "sys.exit(str(slow & set(sys.modules)) if slow & set(sys.modules) else 0)\n"
    )
    result = python("-c", program)
    assert (result.returncode, result.stderr) == (0, "")
    assert "generate" in result.stdout


def test_python_m_moecore_is_the_command_line():
    result = python("-m", "moecore")
    assert result.returncode == 2
    assert "moecore: error: the following arguments are required: COMMAND" in result.stderr


def test_version_is_the_cores(capsys):
    with pytest.raises(SystemExit, match="^None$|^0$"):
        main(["--version"])
    import moecore

    assert capsys.readouterr().out == f"moecore {moecore.__version__}\n"


# --- generate ---


def test_generate_prints_the_text_and_nothing_else(llm, capsys):
    assert main(["generate", "Once upon a time,"]) == 0
    assert capsys.readouterr() == ("there was a fox.\nThe end\n", "")
    assert [call[0] for call in llm.calls] == ["load", "stream", "close"]
    assert llm.calls[1][1] == "Once upon a time,"


def test_generate_prints_each_piece_as_it_comes(llm, monkeypatch):
    writes = []

    class Recorder(io.StringIO):
        def flush(self):
            writes.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Recorder())
    assert main(["generate", "x"]) == 0
    assert writes[:3] == ["there ", "there was ", "there was a "]


def test_generate_passes_options_by_their_names(llm):
    argv = (
        "generate x --model m --revision r --device cpu --dtype float32 --max-model-len 64 --ep 2"
    )
    argv += " --ep 2 --temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 --repetition-penalty 1.1"
    argv += " --seed 3 --stop a --stop b --stop-token-ids 7 8 --ignore-eos --max-tokens 9"
    argv += " --min-tokens 2 --n 2 --logprobs 1 --json"
    assert main(argv.split()) == 0
    assert llm.calls[0] == (
        "load",
        "m",
        {
            "revision": "r",
            "device": "cpu",
            "dtype": "float32",
            "max_model_len": 64,
            "expert_parallel_size": 2,
            "use_tqdm": False,
        },
    )
    assert llm.calls[1][2] == SamplingParams(
        n=2,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        seed=3,
        stop=["a", "b"],
        stop_token_ids=[7, 8],
        ignore_eos=True,
        max_tokens=9,
        min_tokens=2,
        logprobs=1,
    )


def test_generate_leaves_defaults_to_the_library(llm):
    assert main(["generate", "x"]) == 0
    assert llm.calls[0][1] is None
    assert llm.calls[1][2] == SamplingParams(max_tokens=200)


@pytest.mark.parametrize("argv", [["generate"], ["generate", "-"]])
def test_generate_reads_the_prompt_from_a_pipe(llm, monkeypatch, argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    assert main(argv) == 0
    assert llm.calls[1][1] == "two\nlines"


def test_generate_echoes_the_prompt_if_asked(llm, capsys):
    assert main(["generate", "Once ", "--echo"]) == 0
    assert capsys.readouterr().out == "Once there was a fox.\nThe end\n"


def test_generate_json_holds_everything(llm, capsys):
    assert main(["generate", "ü", "--json", "--n", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert (result["prompt"], result["prompt_token_ids"]) == ("ü", [1, 2, 3])
    assert [completion["index"] for completion in result["outputs"]] == [0, 1]
    first = result["outputs"][0]
    assert (first["text"], first["token_ids"]) == (llm.answer, [5])
    assert (first["finish_reason"], first["stop_reason"]) == ("stop", "\n")
    assert first["logprobs"] == [{"5": {"logprob": -0.5, "rank": 1, "decoded_token": None}}]
    timings = result["timings"]
    assert timings["load_seconds"] >= 0
    assert timings["prefill_tokens_per_second"] == pytest.approx(6)  # 3 tokens in 0.5 s
    assert timings["decode_tokens_per_second"] is None  # one token each: no decode was timed


def test_timings_go_to_stderr_with_v_or_on_a_terminal(llm, monkeypatch, capsys):
    assert main(["generate", "x", "-v"]) == 0
    out, err = capsys.readouterr()
    assert out == "there was a fox.\nThe end\n"
    # 5 tokens: the first after 0.5 s, four more in 1 s.
    assert "prefill 3 tokens, 6.0 tok/s | decode 5 tokens, 4.0 tok/s | ended by length" in err
    assert err.startswith("load ")
    assert err.count("\n") == 1

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["generate", "x"]) == 0
    assert "decode 5 tokens" in sys.stderr.getvalue()
    assert llm.calls[-3][2]["use_tqdm"] is True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top-p", "2"], r"top_p must be a number in (0, 1], got 2.0"),
        (["--max-tokens", "4", "--min-tokens", "5"], "min_tokens must be an integer in [0, 4]"),
        (["--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (["--n", "2"], "--n and --logprobs need --json"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_wrong_usage_exits_with_2_before_anything_loads(llm, capsys, argv, message):
    err = usage_error(capsys, "generate", "x", *argv)
    assert message in err
    assert llm.calls == []


def test_a_prompt_is_needed_on_a_terminal(llm, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert "a prompt is needed" in usage_error(capsys, "generate")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("LLM: no such model"), "moecore: LLM: no such model\n"),
        (FileNotFoundError("looked in /x"), "moecore: looked in /x\n"),
        (NotImplementedError("family f"), "moecore: family f\n"),
        (AttributeError("oops"), "moecore: AttributeError: oops (--verbose shows where)\n"),
        (KeyError("k"), "moecore: KeyError: 'k' (--verbose shows where)\n"),
        (ValueError(), "moecore: ValueError:  (--verbose shows where)\n"),
    ],
)
def test_a_failure_is_one_line_and_exits_with_1(llm, capsys, error, message):
    llm.load_error = error
    assert main(["generate", "x"]) == 1
    assert capsys.readouterr() == ("", message)
    with pytest.raises(type(error)):
        main(["generate", "x", "--verbose"])


def test_a_failure_on_the_way_closes_the_model(llm, capsys):
    llm.error = RuntimeError("out of cache")
    assert main(["generate", "x"]) == 1
    assert capsys.readouterr() == ("there ", "moecore: out of cache\n")
    assert llm.calls[-1] == ("close",)


def test_ctrl_c_exits_with_130(llm, capsys):
    llm.error = KeyboardInterrupt()
    assert main(["generate", "x"]) == 130
    assert capsys.readouterr() == ("there ", "\n")
    assert llm.calls[-1] == ("close",)


def test_a_reader_that_leaves_is_no_error():
    import pathlib

    program = pathlib.Path(fake_llm.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(program), "generate", "x"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


# --- chat ---


def chat(monkeypatch, text, *argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", *argv])


def asked(llm):
    return [call[1] for call in llm.calls if call[0] == "chat"]


def test_chat_answers_each_line_of_a_pipe(llm, capsys, monkeypatch):
    llm.answer = "Hello."
    assert chat(monkeypatch, "Hi\n\n Bye \n/exit\n", "--system", "Be kind") == 0
    assert capsys.readouterr() == ("Hello.\n" * 3, "")
    system = {"role": "system", "content": "Be kind"}
    hi = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    bye = [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Hello."}]
    assert asked(llm) == [
        [system, hi[0]],
        [system, *hi, bye[0]],
        # What looks like a command is one only in a terminal.
        [system, *hi, *bye, {"role": "user", "content": "/exit"}],
    ]
    assert [call[1]["prompt_token_ids"] for call in llm.calls if call[0] == "stream"] == [[1]] * 3


def test_chat_without_a_template_says_what_to_do(llm, capsys, monkeypatch):
    llm.tokenizer = type("", (), {"chat_template": None})
    assert chat(monkeypatch, "Hi\n") == 1
    assert capsys.readouterr().err == (
        "moecore: chat: this model has no chat template; use moecore generate\n"
    )


def at_a_terminal(monkeypatch, lines):
    """A chat whose user types these lines; an exception among them is raised."""
    typed = iter(lines)

    def fake_input(prompt):
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", fake_input)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    return main(["chat"])


def test_chat_at_a_terminal_knows_reset_and_exit(llm, monkeypatch):
    assert at_a_terminal(monkeypatch, ["one", "/reset", "two", "/exit", "three"]) == 0
    assert asked(llm) == [[{"role": "user", "content": text}] for text in ("one", "two")]


def test_ctrl_c_cuts_an_answer_short_and_keeps_it(llm, monkeypatch):
    llm.error = KeyboardInterrupt()
    assert at_a_terminal(monkeypatch, ["one", "two"]) == 0
    assert asked(llm)[1][:2] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "there "},
    ]


def test_ctrl_c_at_the_prompt_leaves(llm, monkeypatch, capsys):
    assert at_a_terminal(monkeypatch, ["one", KeyboardInterrupt()]) == 130


def test_a_message_that_cannot_be_answered_is_taken_back(llm, monkeypatch, capsys):
    llm.error = ValueError("too long")
    assert at_a_terminal(monkeypatch, ["one", "two"]) == 0
    assert "moecore: too long\n" in capsys.readouterr().err
    assert asked(llm) == [[{"role": "user", "content": text}] for text in ("one", "two")]
