"""What a run says about its data: the share of time spent waiting for the loader, and of padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from training_toys import ToyData, quiet_trainer, tuner

from himap_train.data.loader import WAITED, Windows
from himap_train.training.callbacks.progress import Throughput

PAUSE, STEP = 2.0, 6.0  # seconds


@dataclass
class Clock:
    """In place of the module `time`: passes when it is told to."""

    now: float = 0.0

    def perf_counter(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in ("data.loader", "training.callbacks.progress"):
        monkeypatch.setattr(f"himap_train.{module}.time", found)
    return found


class Slow(ToyData):
    """Takes its time for each batch."""

    num_workers, group_by_length = 0, False

    def __init__(self, clock: Clock, pause: float) -> None:
        super().__init__(8, 2)
        self.clock, self.pause = clock, pause

    def windowed(self, loader: Any) -> Any:
        return super().windowed(_Paused(loader, self.clock, self.pause))  # type: ignore[arg-type]


@dataclass
class _Paused:
    loader: Any
    clock: Clock
    pause: float

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.clock.now += self.pause
            yield batch


class Metrics(Callback):
    """What was logged with each step; steps take `STEP`."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seen: list[dict[str, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.now += STEP

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(tiny_path: str, folder: Path, clock: Clock, pause: float) -> tuple[Metrics, Any]:
    metrics = Metrics(clock)
    trainer = quiet_trainer(
        folder,
        max_epochs=1,
        log_every_n_steps=1,
        callbacks=[Throughput(), metrics],
        accumulate_grad_batches=1,
    )
    trainer.fit(tuner(tiny_path), datamodule=Slow(clock, pause))
    return metrics, trainer


def test_waiting_is_a_share_of_the_time_between_logs(
    tiny_path: str, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first batch comes before the clock is started."""
    metrics, _ = fit(tiny_path, tmp_path, clock, PAUSE)
    assert [seen["data/wait"] for seen in metrics.seen] == pytest.approx([0.0] + 3 * [PAUSE / (PAUSE + STEP)])
    # ToyData's batches have 2 x 23 tokens, and answers of 1 and 2 or of 3 and 4 in turn
    assert metrics.seen[1]["tokens/s"] == pytest.approx((46 + 3 + 4) / (PAUSE + STEP))
    said = capsys.readouterr().out
    share = 100 * 3 * PAUSE / (3 * PAUSE + 4 * STEP)
    assert f"{share:.1f} % of the training time; raise data.num_workers (it is 0) if cores are idle" in said


def test_no_hint_where_nothing_is_waited_for(
    tiny_path: str, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tiny_path, tmp_path, clock, 0.0)
    said = capsys.readouterr().out
    assert "waited for data 0.0 %" in said and "raise" not in said


def test_padding_of_an_epoch(tiny_path: str, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """ToyData's rows have 23 tokens and 1 to 4 of the answer, in pairs (1, 2) and (3, 4): one pad in each."""
    _, trainer = fit(tiny_path, tmp_path, clock, 0.0)
    expected = 4 / (4 * 25 + 4 * 27)
    assert float(trainer.callback_metrics["data/padding_waste"]) == pytest.approx(expected, abs=1e-6)
    assert f"epoch 0: {100 * expected:.1f} % of the positions were padding" in capsys.readouterr().out


def test_wait_is_noted_for_the_batch_that_was_waited_for(clock: Clock) -> None:
    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for pause in (0.0, PAUSE, 0.0):
            clock.now += pause
            yield {"labels": torch.zeros(1, 3)}

    waited = []
    for batch in Windows(1, lambda: 3).count(batches()):
        waited.append(batch[WAITED])
        clock.now += STEP  # what training does in between is no wait
    assert waited == [0.0, PAUSE, 0.0]
