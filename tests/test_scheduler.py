"""BlockPool and Scheduler: who is in a pass, in which blocks, and that everybody gets through."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecore.kv_cache import BlockPool, blocks_for
from moecore.scheduler import Scheduler, Sequence


def make_scheduler(num_blocks=16, block_size=4, max_num_seqs=8, max_num_batched_tokens=32):
    return Scheduler(
        num_blocks,
        block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )


def add(scheduler, num_tokens):
    sequence = Sequence(token_ids=[0] * num_tokens)
    scheduler.add(sequence)
    return sequence


def run_pass(scheduler):
    """Schedule, compute and extend by one token; returns {sequence: tokens computed}."""
    scheduled = scheduler.schedule()
    computed = {sequence: sequence.num_scheduled_tokens for sequence in scheduled}
    samples = [sequence for sequence in scheduled if sequence.needs_sample]
    scheduler.advance(scheduled)
    for sequence in samples:
        sequence.token_ids.append(0)
    return computed


def test_decodes_come_before_prompts_and_prompts_are_cut_to_the_rest():
    scheduler = make_scheduler(max_num_seqs=4, max_num_batched_tokens=6)
    first, second = add(scheduler, 3), add(scheduler, 2)
    assert run_pass(scheduler) == {first: 3, second: 2}
    long, late = add(scheduler, 7), add(scheduler, 2)
    assert run_pass(scheduler) == {first: 1, second: 1, long: 4}
    assert run_pass(scheduler) == {first: 1, second: 1, long: 3, late: 1}
    assert run_pass(scheduler) == {first: 1, second: 1, long: 1, late: 1}


def test_decodes_of_every_sequence_fit_beside_a_prompt():
    scheduler = make_scheduler(max_num_seqs=3, max_num_batched_tokens=3)
    first, second = add(scheduler, 1), add(scheduler, 1)
    run_pass(scheduler)
    prompt = add(scheduler, 5)
    for _ in range(4):
        assert run_pass(scheduler) == {first: 1, second: 1, prompt: 1}


def test_no_more_sequences_run_than_allowed():
    scheduler = make_scheduler(max_num_seqs=2)
    first, second, third = (add(scheduler, 2) for _ in range(3))
    assert run_pass(scheduler) == {first: 2, second: 2}
    assert run_pass(scheduler) == {first: 1, second: 1}
    scheduler.remove(first)
    assert run_pass(scheduler) == {second: 1, third: 2}


def test_a_block_is_taken_only_when_a_token_needs_it():
    scheduler = make_scheduler(block_size=4)
    sequence = add(scheduler, 4)
    for num_blocks in [1, 2, 2, 2, 2, 3]:
        run_pass(scheduler)
        assert len(sequence.block_ids) == num_blocks


def test_the_youngest_pauses_then_gives_its_blocks_to_an_older_one():
    scheduler = make_scheduler(num_blocks=5, block_size=2)
    old, young = add(scheduler, 3), add(scheduler, 2)
    assert run_pass(scheduler) == {old: 3, young: 2}
    for _ in range(2):
        assert run_pass(scheduler) == {old: 1, young: 1}
    # All five blocks are full or in use: `young` needs a third, and waits with its two.
    assert run_pass(scheduler) == {old: 1}
    assert (len(young.block_ids), young.num_cached_tokens) == (2, 4)
    # `old` needs a fourth.
    assert run_pass(scheduler) == {old: 1}
    assert list(scheduler.waiting) == [young]
    assert (len(young.block_ids), young.num_cached_tokens, young.num_preemptions) == (0, 0, 1)
    scheduler.remove(old)
    assert run_pass(scheduler) == {young: 5}  # the prompt of 2, and 3 tokens generated since


def test_a_paused_sequence_goes_on_where_it_was():
    scheduler = make_scheduler(num_blocks=5, block_size=2)
    old, young = add(scheduler, 3), add(scheduler, 2)
    for _ in range(4):
        run_pass(scheduler)
    scheduler.remove(old)
    assert run_pass(scheduler) == {young: 1}
    assert young.num_preemptions == 0


def test_a_preempted_sequence_is_ahead_of_those_that_came_later():
    scheduler = make_scheduler(num_blocks=5, block_size=2, max_num_seqs=2)
    _, young, later = add(scheduler, 3), add(scheduler, 2), add(scheduler, 1)
    for _ in range(5):
        run_pass(scheduler)
    assert list(scheduler.waiting) == [young, later]


def test_a_prompt_starts_only_if_running_sequences_can_still_grow():
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    first = add(scheduler, 3)
    run_pass(scheduler)
    second = add(scheduler, 3)  # two blocks, and one for `first`, of which two are free
    assert run_pass(scheduler) == {first: 1}
    scheduler.remove(first)
    assert run_pass(scheduler) == {second: 3}


def test_nobody_overtakes_a_prompt_that_does_not_fit_yet():
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    first = add(scheduler, 3)
    run_pass(scheduler)
    add(scheduler, 8)
    add(scheduler, 1)
    assert run_pass(scheduler) == {first: 1}


def test_a_sequence_may_fill_the_whole_cache():
    scheduler = make_scheduler(num_blocks=3, block_size=2, max_num_seqs=4, max_num_batched_tokens=4)
    sequence = add(scheduler, 5)
    assert scheduler.capacity == 6
    assert [run_pass(scheduler)[sequence] for _ in range(3)] == [4, 1, 1]
    assert scheduler.pool.num_free == 0


def test_removing_frees_blocks_wherever_the_sequence_is():
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = add(scheduler, 9), add(scheduler, 1)
    run_pass(scheduler)
    scheduler.remove(waiting)
    scheduler.remove(running)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert scheduler.schedule() == []
    with pytest.raises(ValueError, match="sequence must run or wait"):
        scheduler.remove(running)


def test_clear_frees_everything():
    scheduler = make_scheduler(max_num_seqs=2)
    for _ in range(4):
        add(scheduler, 9)
    run_pass(scheduler)
    scheduler.clear()
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert scheduler.schedule() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_batched_tokens": 7}, "max_num_batched_tokens must be at least .* got 7 with"),
    ],
    ids=["num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens"],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(**arguments)


@st.composite
def workloads(draw):
    block_size = draw(st.integers(1, 5))
    num_blocks = draw(st.integers(1, 12))
    capacity = num_blocks * block_size
    max_num_seqs = draw(st.integers(1, 5))
    max_num_batched_tokens = draw(st.integers(max_num_seqs, max_num_seqs + 12))
    # Each: the pass before which it comes, tokens of its prompt, tokens at its end. The last token
    # is never computed, so that a sequence one longer than the cache still fits.
    sequence = st.tuples(
        st.integers(0, 20),
        st.integers(1, capacity),
        st.integers(1, 15),
    ).map(lambda s: (s[0], s[1], min(s[1] + s[2], capacity + 1)))
    arrivals = draw(st.lists(sequence, min_size=1, max_size=8))
    scheduler = make_scheduler(num_blocks, block_size, max_num_seqs, max_num_batched_tokens)
    return scheduler, sorted(arrivals)


def check_pass(scheduler, scheduled, number_of):
    assert sum(s.num_scheduled_tokens for s in scheduled) <= scheduler.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    order = [number_of[s] for s in (*scheduler.running, *scheduler.waiting)]
    assert order == sorted(order), "a younger sequence runs while an older one waits"
    assert scheduled[0] is scheduler.running[0], "the oldest sequence is not in the pass"
    for sequence in scheduled:
        end = sequence.num_cached_tokens + sequence.num_scheduled_tokens
        assert 1 <= sequence.num_scheduled_tokens <= sequence.num_uncached_tokens
        assert len(sequence.block_ids) == blocks_for(end, scheduler.block_size)
    for sequence in scheduler.waiting:
        assert not sequence.block_ids
        assert sequence.num_cached_tokens == 0
    in_use = [block_id for s in scheduler.running for block_id in s.block_ids]
    assert len(in_use) == len(set(in_use)), "a block has two owners"
    assert len(in_use) + scheduler.pool.num_free == scheduler.pool.num_blocks


@settings(deadline=None, max_examples=200)
@given(workloads())
def test_every_mix_gets_through_in_order_and_leaks_nothing(workload):
    scheduler, arrivals = workload
    final_len, number_of = {}, {}
    pass_number = 0
    while arrivals or final_len:
        while arrivals and arrivals[0][0] <= pass_number:
            _, num_prompt_tokens, num_tokens = arrivals.pop(0)
            sequence = add(scheduler, num_prompt_tokens)
            final_len[sequence] = num_tokens
            number_of[sequence] = len(number_of)
        pass_number += 1
        if not final_len:
            continue
        scheduled = scheduler.schedule()
        check_pass(scheduler, scheduled, number_of)
        samples = [sequence for sequence in scheduled if sequence.needs_sample]
        scheduler.advance(scheduled)
        for sequence in samples:
            sequence.token_ids.append(0)
            if len(sequence.token_ids) == final_len[sequence]:
                scheduler.remove(sequence)
                del final_len[sequence]
        assert pass_number < 2000, "a sequence starves"
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_blocks_freed_together_come_back_in_their_order():
    pool = BlockPool(6)
    first, second = pool.allocate(3), pool.allocate(2)
    pool.free(first)
    assert pool.allocate(2) == first[:2]
    pool.free(second)
    assert pool.allocate(3) == second + first[2:]


@given(st.integers(6, 20), st.lists(st.integers(0, 6), max_size=20))
def test_a_block_has_one_owner_until_it_is_freed(num_blocks, counts):
    pool = BlockPool(num_blocks)
    owned = []
    for count in counts:
        if count > pool.num_free:
            pool.free(owned.pop(len(owned) // 2))
            continue
        block_ids = pool.allocate(count)
        assert not set(block_ids) & {block_id for ids in owned for block_id in ids}
        owned.append(block_ids)
    assert pool.num_free == num_blocks - sum(map(len, owned))


def test_block_pool_refuses_what_would_give_a_block_two_owners():
    pool = BlockPool(3)
    block_ids = pool.allocate(2)
    with pytest.raises(ValueError, match=r"count must be in \[0, free blocks\], got 2 with 1 free"):
        pool.allocate(2)
    with pytest.raises(ValueError, match="count must be in"):
        pool.allocate(-1)
    pool.free(block_ids[:1])
    with pytest.raises(ValueError, match=f"must be in use, got {block_ids[0]}"):
        pool.free(block_ids[:1])
    with pytest.raises(ValueError, match=r"must be in \[0, 3\), got 3"):
        pool.free([3])
    with pytest.raises(ValueError, match=r"must be in \[0, 3\), got -1"):
        pool.free([-1])
    assert pool.num_free == 2
