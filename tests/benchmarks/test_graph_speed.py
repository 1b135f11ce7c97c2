"""The clock of the benchmark of graphs' speed."""

import itertools

from benchmarks import graph_few, graph_settings, graph_speed

WINE = {"source": "wine", "labels_per_class": 5, "num_val": 40, "num_test": -1}


def test_a_loop_is_timed_after_the_warm_up(monkeypatch):
    """Epoch i takes i seconds by this clock: of epochs 24 to 30, after four of warm-up and twenty more, the median is 27."""
    seen, epochs = [], itertools.chain.from_iterable((0.0, float(i)) for i in range(31))
    monkeypatch.setattr(graph_speed.time, "perf_counter", lambda: next(epochs))

    class Watched(graph_speed.Run):
        def __init__(self, *args, **options):
            with monkeypatch.context() as patch:
                patch.setattr(graph_speed.time, "perf_counter", lambda: 0.0)
                super().__init__(*args, **options)
            seen.append(self)

    monkeypatch.setattr(graph_speed, "Run", Watched)
    arguments = graph_settings.DEFAULT | graph_few.METHODS["decoupled, joint"] | {"hidden_channels": 8, "warmup_epochs": 4}
    assert graph_speed.loop_ms(arguments, WINE, 31) == 27000
    (run,) = seen
    step = run.steps.optimizer.state[next(run.module.encoder.parameters())]["step"]
    assert int(step) == 31 and run.module.encoder.decoupled and run.module.warmup_epochs == 4


def test_methods_compared_are_known():
    assert set(graph_speed.LOOPED.values()) <= set(graph_few.METHODS)
    assert graph_few.METHODS[list(graph_speed.LOOPED.values())[-1]]["encoder"] == "decoupled"
