"""LLM on several ranks: the bits of one, and every way to ask."""

import itertools
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import moecore
from checkpoints import VOCAB, make_model, save
from moecore import LLM, SamplingParams
from moecore.engine import sample
from moecore.expert_parallel import launch
from moecore.hub import resolve_model
from rank_pool import RankPool

PROMPTS = ["Once upon a time", "The king", "In the dark wood there lived a"]
GREEDY = SamplingParams(temperature=0, max_tokens=24)
IDS = torch.randint(1, VOCAB, (90,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = RankPool(7, str(tmp_path_factory.mktemp("ranks") / "socket"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    families = {name: tmp_path_factory.mktemp(name) for name in ("Mixtral", "Qwen3Moe")}
    for name, folder in families.items():
        save(make_model(name), folder)
    return {"bundled": resolve_model(None), **families}


@pytest.fixture
def logits(monkeypatch):
    """Every row of logits that this process draws from, by its request and token."""
    rows = {}

    def recorded(batch, samplers):
        for row, sampler in zip(batch, samplers, strict=True):
            rows[sampler.request_id, sampler.num_tokens] = row.clone()
        return sample(batch, samplers)

    monkeypatch.setattr("moecore.engine.sample", recorded)
    return rows


@pytest.fixture(scope="module")
def llm():
    with LLM(
        device="cpu", expert_parallel_size=2, expert_parallel_backend="threads", use_tqdm=False
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone():
    with LLM(device="cpu", use_tqdm=False) as llm:
        yield llm


def generate(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


def everything(results):
    """What results say, without times and names."""
    return [(r.prompt, r.prompt_token_ids, r.outputs, r.finished) for r in results]


def run(folder, **options):
    """Seven requests of different lengths, in passes of at most 64 tokens."""
    has_text = folder == resolve_model(None)
    vocab = 4096 if has_text else VOCAB
    likely = {"max_tokens": 4, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0, logprobs=vocab, **likely),
        SamplingParams(temperature=0.8, seed=3, max_tokens=12),
        SamplingParams(temperature=0.9, max_tokens=9),
        SamplingParams(temperature=0, logprobs=3, repetition_penalty=1.3, max_tokens=14),
        SamplingParams(temperature=1.2, top_p=0.9, max_tokens=5, logprobs=vocab, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(temperature=0.8, seed=5, max_tokens=8, stop="the" if has_text else None),
    ]
    lengths = (5, 90, 1, 33, 12, 64, 7)
    prompts = [{"prompt_token_ids": IDS[:length]} for length in lengths]
    with LLM(
        folder,
        device="cpu",
        max_num_seqs=16,
        max_num_batched_tokens=64,
        skip_tokenizer_init=not has_text,
        use_tqdm=False,
        **options,
    ) as llm:
        return everything(generate(llm, prompts, params))


@pytest.fixture(scope="module")
def wanted():
    return {}  # results of one rank and its logits, by model


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("backend", ["threads", "processes"])
@pytest.mark.parametrize("name", ["bundled", "Mixtral", "Qwen3Moe"])
def test_any_number_of_ranks_gives_the_bits_of_one(
    name, backend, size, folders, pool, logits, wanted, monkeypatch
):
    folder = folders[name]
    if name not in wanted:
        wanted[name] = run(folder), dict(logits)
        logits.clear()
    results, rows = wanted[name]
    monkeypatch.setattr(launch, "start_processes", pool.start)
    assert run(folder, expert_parallel_size=size, expert_parallel_backend=backend) == results
    if backend == "threads":
        assert rows.keys() == logits.keys()
    # Requests of the processes show their logits in the results: log-probabilities of all tokens.
    assert logits
    assert all(torch.equal(logits[key], rows[key]) for key in logits)


def test_experts_that_do_not_divide_by_the_ranks_are_shared_out_all_the_same(folders):
    want = run(folders["bundled"])
    for size in (3, 5):
        ranks = {"expert_parallel_size": size, "expert_parallel_backend": "threads"}
        assert run(folders["bundled"], **ranks) == want


def test_the_bits_hold_in_float32_and_with_a_small_cache(folders):
    size = {"expert_parallel_size": 2, "expert_parallel_backend": "threads"}
    options = {"dtype": "float32", "max_model_len": 128, "kv_cache_memory": 3 * 64 * 6 * 2048}
    assert run(folders["bundled"], **options, **size) == run(folders["bundled"], **options)


# --- every way to ask ---


def test_requests_are_shared_out_evenly_and_in_order(llm):
    for number in range(5):
        llm.engine.add_request(str(number), [5, 6], SamplingParams(n=1 + (number == 1)))
    # The second counts twice, so that the fifth goes to rank 0 as well.
    assert [llm.engine.rank_of(str(number)) for number in range(5)] == [0, 1, 0, 0, 1]
    ended = [llm.engine.abort_request(str(number)) for number in range(5)]
    assert [e.outputs[0].finish_reason for e in ended] == ["abort"] * 5
    assert len(ended[1].outputs) == 2
    assert llm.engine.abort_request("0") is None
    assert not llm.engine.has_unfinished
    assert llm.engine.step() == []


def test_streams_grow_to_what_one_rank_gives_in_turn_and_alone(llm, alone):
    want = [r.outputs[0].text for r in generate(alone, PROMPTS)]
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS]
    texts = [[] for _ in streams]
    for _ in range(30):
        for seen, stream in zip(texts, streams, strict=True):
            seen += [output.outputs[0].text for output in itertools.islice(stream, 1)]
    assert [seen[-1] for seen in texts] == want
    assert all(b.startswith(a) for seen in texts for a, b in itertools.pairwise(seen))
    assert min(len(set(seen)) for seen in texts) > 5


def test_closing_a_stream_ends_its_request_on_its_rank(llm):
    long = SamplingParams(max_tokens=500, ignore_eos=True)
    streams = [llm.stream(PROMPTS[0], long) for _ in range(2)]
    outputs = [next(stream) for stream in streams]
    assert {llm.engine.rank_of(output.request_id) for output in outputs} == {0, 1}
    for stream in streams:
        stream.close()
    assert not llm.engine.has_unfinished


def test_threads_may_share_the_ranks(llm, alone):
    want = [r.outputs[0].text for r in generate(alone, PROMPTS)] * 2
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda prompt: generate(llm, prompt)[0], PROMPTS * 2))
    assert [r.outputs[0].text for r in results] == want


def test_chat_and_times_are_there_on_every_rank(llm, tmp_path):
    folder = shutil.copytree(resolve_model(None), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    ranks = {"expert_parallel_size": 3, "expert_parallel_backend": "threads"}
    with LLM(folder, device="cpu", use_tqdm=False, **ranks) as chatty:
        results = chatty.chat(messages, GREEDY, use_tqdm=False)
    assert [r.prompt for r in results] == PROMPTS
    for result in results:
        times = result.metrics
        assert times.arrival_time < times.first_token_time < times.finished_time
        assert times.finished_time - times.arrival_time < 60


def test_a_default_seed_depends_on_the_order_alone(alone):
    params = SamplingParams(temperature=1.0, max_tokens=12)
    runs = []
    for size in (1, 3):
        with LLM(
            device="cpu",
            seed=11,
            expert_parallel_size=size,
            expert_parallel_backend="threads",
            use_tqdm=False,
        ) as llm:
            runs.append([r.outputs[0].token_ids for r in generate(llm, PROMPTS * 2, params)])
    assert runs[0] == runs[1]
    assert len(set(map(tuple, runs[0]))) == 6


@pytest.mark.parametrize("seed", [1, 2])
def test_requests_that_come_and_go_between_passes_get_what_they_get_alone(seed, llm, alone):
    choice = random.Random(seed)
    wanted, ended = {}, {}
    for number in range(40):
        prompt = {"prompt_token_ids": IDS[: choice.randint(1, 40)]}
        params = SamplingParams(seed=number, max_tokens=choice.randint(1, 12), ignore_eos=True)
        wanted[str(number)] = prompt, params
        stream = choice.random() < 0.5
        llm.engine.add_request(str(number), *prompt.values(), params, stream=stream)
        if choice.random() < 0.2:
            gone = str(choice.randint(0, number))
            output = llm.engine.abort_request(gone)
            assert (output is None) == (gone not in wanted)
            wanted.pop(gone, None)
        for _ in range(choice.randint(0, 3)):
            for output in llm.engine.step():
                if output.finished:
                    ended[output.request_id] = output, *wanted.pop(output.request_id)
    while llm.engine.has_unfinished:
        for output in llm.engine.step():
            if output.finished:
                ended[output.request_id] = output, *wanted.pop(output.request_id)
    assert wanted == {}
    assert len(ended) > 20
    for output, prompt, params in ended.values():
        assert output.outputs == generate(alone, prompt, params)[0].outputs


def test_an_error_in_sampling_ends_the_requests_and_not_the_ranks(llm, alone, monkeypatch):
    from moecore.expert_parallel.rank import GroupRunner

    run_of = GroupRunner.run
    for culprit in ("MainThread", "moecore-rank-1"):

        def broken(self, batch, culprit=culprit):
            logits = run_of(self, batch)
            return logits * torch.nan if threading.current_thread().name == culprit else logits

        with monkeypatch.context() as patch:
            patch.setattr(GroupRunner, "run", broken)
            with pytest.raises(ValueError, match="logits of request '.*' must be finite"):
                generate(llm, PROMPTS)
        assert not llm.engine.has_unfinished
        assert everything(generate(llm, PROMPTS)) == everything(generate(alone, PROMPTS))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt_token_ids must have a length"),
        ([5, 10**6], "must be integers in .*got 1000000 at position 1"),
    ],
)
def test_a_prompt_that_cannot_run_starts_nothing(llm, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(llm, [PROMPTS[0], {"prompt_token_ids": prompt}])
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "expert_parallel_size must be an integer >= 1, got 0"),
        ({"size": -2}, "expert_parallel_size must be an integer >= 1, got -2"),
        ({"size": 2.0}, "expert_parallel_size must be an integer >= 1, got 2.0"),
        ({"size": True}, "expert_parallel_size must be an integer >= 1, got True"),
        ({"size": "4"}, "expert_parallel_size must be an integer >= 1, got '4'"),
        ({"size": 9}, r"expert_parallel_size must be at most .* experts \(8\), got 9"),
        ({"size": 2, "backend": "mpi"}, "backend must be 'processes' or 'threads', got 'mpi'"),
        ({"size": 2, "timeout": 0}, "timeout must be a number of seconds > 0, got 0"),
        ({"size": 2, "timeout": "1"}, "timeout must be a number of seconds > 0, got '1'"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    options = {f"expert_parallel_{name}": value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=f"^LLM: .*{message}"):
        LLM(device="cpu", use_tqdm=False, **options)


def our_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("moecore-")}


def test_threads_of_the_process_are_given_back(any_num_threads):
    before, running = (moecore.num_threads(), torch.get_num_threads()), our_threads()
    with LLM(
        device="cpu", expert_parallel_size=2, expert_parallel_backend="threads", use_tqdm=False
    ):
        assert moecore.num_threads() == max(1, before[0] // 2)
    assert (moecore.num_threads(), torch.get_num_threads()) == before
    assert our_threads() == running


def test_a_closed_model_says_so():
    llm = LLM(
        device="cpu", expert_parallel_size=2, expert_parallel_backend="threads", use_tqdm=False
    )
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="the model is closed"):
        generate(llm, PROMPTS[0])
