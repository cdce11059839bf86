"""A ModelRunner without a model: what it predicts depends on everything that lies in its cache."""

import zlib

import torch


def make_logits(tokens, vocab_size):
    """Logits [V] after these tokens: random numbers that all of them, in their order, decide."""
    state = 0
    trace = []
    for position, token in enumerate(tokens):
        state = zlib.crc32(f"{state} {token} {position}".encode())
        trace.append((token, position, state))
    return logits_of_trace(trace, vocab_size)


def logits_of_trace(trace, vocab_size):
    generator = torch.Generator().manual_seed(zlib.crc32(repr(trace).encode()))
    return 2.0 * torch.randn(vocab_size, generator=generator)


class FakeRunner:
    """Keeps (token, position, state) in every slot of its cache, and reads all of it back.

    A slot's state comes from that of the position before it, as the keys of a deeper layer do, at
    the time the slot is written. Logits come from every slot of the sequence up to the row: a wrong
    block, position or row, a token lost, written twice or too late, each changes the output.
    """

    def __init__(self, num_blocks=64, block_size=4, vocab_size=23, max_model_len=64):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.cache = {}
        self.batches = []

    def run(self, batch):
        self.batches.append(batch)
        self.check(batch)
        offsets = batch.query_offsets.tolist()
        token_ids, positions = batch.token_ids.tolist(), batch.positions.tolist()
        logits = {}
        wanted = set(batch.logit_rows.tolist())
        for s, table in enumerate(batch.block_tables.tolist()):
            for row in range(offsets[s], offsets[s + 1]):
                self.write(table, token_ids[row], positions[row])
                if row in wanted:
                    trace = [self.read(table, p) for p in range(positions[row] + 1)]
                    logits[row] = logits_of_trace(trace, self.vocab_size)
        rows = [logits[row] for row in batch.logit_rows.tolist()]
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def slot(self, table, position):
        block = table[position // self.block_size]
        assert 0 <= block < self.num_blocks
        return block, position % self.block_size

    def read(self, table, position):
        return self.cache[self.slot(table, position)]

    def write(self, table, token, position):
        state = self.read(table, position - 1)[2] if position > 0 else 0
        state = zlib.crc32(f"{state} {token} {position}".encode())
        self.cache[self.slot(table, position)] = (token, position, state)

    def check(self, batch):
        num_seqs, num_tokens = len(batch.context_lens), len(batch.token_ids)
        assert batch.logit_rows.dtype == torch.int64
        lists = (batch.token_ids, batch.positions, batch.query_offsets, batch.context_lens)
        for tensor in lists:
            assert tensor.dtype == torch.int32
        assert batch.block_tables.dtype == torch.int32
        assert batch.positions.shape == (num_tokens,)
        assert batch.query_offsets.shape == (num_seqs + 1,)
        assert batch.query_offsets[0] == 0
        assert batch.query_offsets[-1] == num_tokens
        lasts = batch.query_offsets[1:].long() - 1
        assert torch.equal(batch.positions[lasts] + 1, batch.context_lens)
        assert set(batch.logit_rows.tolist()) <= set(lasts.tolist())
        num_blocks = -(-batch.context_lens // self.block_size)
        used = (batch.block_tables >= 0).sum(dim=1)
        assert torch.equal(used, num_blocks)
        assert batch.block_tables.shape == (num_seqs, int(num_blocks.max()))
        in_use = batch.block_tables[batch.block_tables >= 0]
        assert len(in_use.unique()) == len(in_use), "two sequences share a block"
