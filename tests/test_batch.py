"""What a pass takes: every field of a batch, with and without prompts in it."""

from array import array
from dataclasses import fields

import torch

from moecore.batch import Batch
from moecore.scheduler import Sequence


def decode(tokens, blocks):
    return Sequence(
        token_ids=tokens,
        num_cached_tokens=len(tokens) - 1,
        num_scheduled_tokens=1,
        block_ids=array("i", blocks),
    )


def chunk(tokens, begin, end, blocks):
    sequence = Sequence(token_ids=tokens, num_cached_tokens=begin, block_ids=array("i", blocks))
    sequence.num_scheduled_tokens = end - begin
    return sequence


DECODES = [decode([5, 6, 7], [4]), decode(list(range(9)), [2, 0, 1]), decode([8], [3])]


def as_lists(batch):
    return {field.name: getattr(batch, field.name).tolist() for field in fields(batch)}


def test_a_batch_of_decodes_has_the_newest_token_of_each():
    assert as_lists(Batch.of(DECODES)) == {
        "token_ids": [7, 8, 8],
        "positions": [2, 8, 0],
        "query_offsets": [0, 1, 2, 3],
        "context_lens": [3, 9, 1],
        "block_tables": [[4, -1, -1], [2, 0, 1], [3, -1, -1]],
        "logit_rows": [0, 1, 2],
    }
    assert as_lists(Batch.of(DECODES[:1]))["block_tables"] == [[4]]


def test_a_batch_with_chunks_has_their_tokens_and_logits_of_what_is_complete():
    partial = chunk([10, 11, 12, 13], 1, 3, [7])
    last_but_one = chunk([20, 21], 0, 1, [8])
    batch = Batch.of([DECODES[0], partial, last_but_one, DECODES[1]])
    assert as_lists(batch) == {
        "token_ids": [7, 11, 12, 20, 8],
        "positions": [2, 1, 2, 0, 8],
        "query_offsets": [0, 1, 3, 4, 5],
        "context_lens": [3, 3, 1, 9],
        "block_tables": [[4, -1, -1], [7, -1, -1], [8, -1, -1], [2, 0, 1]],
        "logit_rows": [0, 4],
    }
    # A pass of one token each is no pass of decodes if one of them is the middle of a prompt.
    assert as_lists(Batch.of([DECODES[0], last_but_one]))["logit_rows"] == [0]


def test_tensors_have_the_same_form_with_and_without_chunks():
    plain, mixed = Batch.of(DECODES), Batch.of([*DECODES, chunk([1, 2, 3], 0, 2, [9])])
    for field in fields(plain):
        a, b = getattr(plain, field.name), getattr(mixed, field.name)
        assert (a.dtype, a.dim(), a.is_contiguous()) == (b.dtype, b.dim(), b.is_contiguous())


def test_a_batch_does_not_share_its_blocks_with_the_scheduler():
    sequence = decode([1, 2], [5])
    batch = Batch.of([sequence])
    sequence.block_ids.append(6)
    sequence.block_ids[0] = 9
    assert torch.equal(batch.block_tables, torch.tensor([[5]], dtype=torch.int32))
