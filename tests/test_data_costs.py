"""What a run says about its data: the share of time spent waiting for the loader, and of padding."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data_examples import talk
from lightning.pytorch import Callback
from tiny import tiny_processor
from training_toys import ToyData, quiet_trainer, save_tiny, tuner

from himap_train.data.check import check_source
from himap_train.data.windows import WAITED, Windows
from himap_train.training.callbacks.data_costs import DataCosts
from himap_train.training.callbacks.progress import Throughput

PAUSE = 0.05


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


class Paused:
    """A loader that takes its time for each batch."""

    def __init__(self, loader: Any, pause: float) -> None:
        self.loader, self.pause = loader, pause
        self.took: list[float] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            start = time.perf_counter()
            time.sleep(self.pause)
            self.took.append(time.perf_counter() - start)
            yield batch


class Slow(ToyData):
    """Takes its time for each batch."""

    num_workers, group_by_length = 0, False

    def __init__(self, pause: float) -> None:
        super().__init__(8, 2)
        self.pause = pause

    def windowed(self, loader: Any) -> Any:
        self.paused = Paused(loader, self.pause)
        return super().windowed(self.paused)  # type: ignore[arg-type]


class Metrics(Callback):
    """What was logged with each step, and the wall time of the steps."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.ends.append(time.perf_counter())


def fit(tiny_path: str, folder: Path, pause: float) -> tuple[Metrics, Any, list[float]]:
    metrics = Metrics()
    trainer = quiet_trainer(
        folder,
        max_epochs=1,
        log_every_n_steps=1,
        callbacks=[Throughput(), DataCosts(), metrics],
        accumulate_grad_batches=1,
    )
    data = Slow(pause)
    trainer.fit(tuner(tiny_path), datamodule=data)
    return metrics, trainer, data.paused.took


def test_waiting_is_a_share_of_the_time_between_logs(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compared with the clock of the test itself, from one step's end to the next."""
    metrics, _, took = fit(tiny_path, tmp_path, PAUSE)
    steps = [after - before for before, after in zip(metrics.ends, metrics.ends[1:], strict=False)]
    for step, wait, seen in zip(steps, took[1:], metrics.seen[1:], strict=True):
        assert seen["data/wait"] == pytest.approx(wait / step, abs=0.25)
        assert seen["tokens/s"] < 2 * 29 / PAUSE  # no batch has more tokens, and each was waited for
    said = capsys.readouterr().out
    assert "of the training time; raise data.num_workers (it is 0) if cores are idle" in said


def test_no_hint_where_nothing_is_waited_for(
    tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("himap_train.training.callbacks.data_costs.HINT_ABOVE", 0.9)
    fit(tiny_path, tmp_path, 0.0)
    said = capsys.readouterr().out
    assert "waited for data" in said and "raise" not in said


def test_padding_of_an_epoch(tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ToyData's rows have 23 tokens and 1 to 4 of the answer, in pairs (1, 2) and (3, 4): one pad in each."""
    _, trainer, _ = fit(tiny_path, tmp_path, 0.0)
    expected = 4 / (4 * 25 + 4 * 27)
    assert float(trainer.callback_metrics["data/padding_waste"]) == pytest.approx(expected, abs=1e-6)
    assert f"epoch 0: {100 * expected:.1f} % of the positions were padding" in capsys.readouterr().out


def test_wait_is_noted_for_the_batch_that_was_waited_for() -> None:
    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for pause in (0.0, PAUSE, 0.0):
            time.sleep(pause)
            yield {"labels": torch.zeros(1, 3)}

    waited = []
    for batch in Windows(1, lambda: 3).count(batches()):
        waited.append(batch[WAITED])
        time.sleep(4 * PAUSE)  # what training does in between is no wait
    assert waited[1] >= PAUSE and max(waited) < 4 * PAUSE


def test_data_check_tells_the_padding_to_expect() -> None:
    """Two lengths in equal numbers: grouped, batches of two have no padding."""
    short, long = talk("What?", "x"), talk("What?", "x" * 61)
    source: Any = [short, long] * 40
    report = check_source(source, tiny_processor(), batch_size=2)
    (_, a), (_, b) = report.lengths[:2]
    assert report.padding is not None
    size, plain, grouped = report.padding
    # half of the pairs are mixed; each of those wastes b - a of 2 b positions
    mixed, same = (b - a) / 2, (a + 3 * b) / 2
    assert size == 2 and plain == pytest.approx(mixed / same, rel=0.35) and grouped < plain / 3
    assert f"{100 * plain:.0f} % of the positions in batches of 2; {100 * grouped:.0f} % with" in str(report)
