"""Shards: every sample once, as many batches in each process."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler

from datamodules.shards import ShardedBatches, in_order


@given(samples=st.integers(1, 200), batch_size=st.integers(1, 20), processes=st.integers(1, 9))
def test_every_sample_is_in_one_shard_and_shards_have_as_many_batches(samples, batch_size, processes):
    if samples < processes:
        with pytest.raises(ValueError, match=rf"`number` gives {samples} samples, but {processes} processes"):
            ShardedBatches(samples, batch_size, processes, 0, "number")
        return
    shards = [ShardedBatches(samples, batch_size, processes, rank, "number") for rank in range(processes)]
    assert [index for shard in shards for batch in shard for index in batch] == list(range(samples))
    assert {len(list(shard)) for shard in shards} == {len(shards[0])}
    sizes = [len(batch) for shard in shards for batch in shard]
    assert min(sizes) >= 1 and max(sizes) <= max(batch_size, 2 if batch_size == 1 else batch_size)
    assert isinstance(shards[0], DistributedSampler)  # Lightning leaves those alone


def test_one_process_gets_an_ordinary_dataloader():
    samples = torch.arange(5.0)
    assert [batch.tolist() for batch in in_order(samples, "number", None, 2)] == [[0, 1], [2, 3], [4]]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert [batch.tolist() for batch in in_order(samples, "number", trainer, 2)] == [[0, 1], [2, 3], [4]]


def test_batches_of_a_process_are_collated():
    class Two:
        world_size, global_rank = 2, 1

    batches = list(in_order([{"x": torch.tensor(i)} for i in range(5)], "number", Two(), 3))
    assert [batch["x"].tolist() for batch in batches] == [[3, 4]]
