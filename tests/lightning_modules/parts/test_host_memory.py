"""Hidden states in the host's memory: what is read is what was put last, round after round."""

import torch

from lightning_modules.parts.block_stream import BlockStream
from lightning_modules.parts.host_memory import HostMemory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_every_round_reads_what_the_last_has_put():
    memory, expected = HostMemory(DEVICE), {}
    for key in range(5):
        expected[key] = torch.full((3, 4), float(key))
        memory.put(key, expected[key].to(DEVICE))
    for _ in range(4):
        for key in range(5):
            assert torch.equal(memory.get(key).cpu(), expected[key])
            expected[key] = memory.get(key).cpu() * 2 + 1
            memory.put(key, memory.get(key) * 2 + 1)
            assert torch.equal(memory.get(key).cpu(), expected[key]), "a step reads again what it has just put"
    assert len(memory._fetched) <= 2, "no more than the batch at work and the next are on the device"


def test_one_batch_is_its_own_successor():
    memory = HostMemory(DEVICE)
    memory.put(7, torch.zeros(2, device=DEVICE))
    for value in (1.0, 2.0):
        memory.put(7, torch.full((2,), value, device=DEVICE))
        assert memory.get(7).tolist() == [value, value]


def test_a_stream_gives_the_same_from_either_memory():
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(3)]).to(DEVICE)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6).to(DEVICE), *blocks)
    inputs = [torch.randn(2, 3, 4, device=DEVICE) for _ in range(4)]
    streams = [BlockStream(list(blocks)), BlockStream(list(blocks))]
    for key, x in enumerate(inputs):
        for stream in streams:
            stream.capture(key, lambda x=x: model(x))
        if key == 0:
            streams[1].move_to_host()
    with torch.no_grad():
        for index in range(3):
            for key in range(4):
                first, second = (stream.run(key, index) for stream in streams)
                assert torch.equal(first, second)
                for stream in streams:
                    stream.advance(key, index)
        assert all(torch.equal(streams[1].hidden(key), model(x)) for key, x in enumerate(inputs))
