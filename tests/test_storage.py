"""What is written is whole or not there, as open as its neighbours are, and killed processes leave nothing."""

from __future__ import annotations

import os
import signal
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from export_toys import PRUNED, trained
from processes import dead_process
from safetensors.torch import save_file
from test_training_resume import full_disk
from tiny import tiny_processor

from himap_train import storage
from himap_train.checkpoints.export import export_adapter, export_merged
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.command_line import run_command
from himap_train.storage import atomic_file, atomic_folder, remove_leftovers, write_failure
from himap_train.training.callbacks.checkpoints import AtomicCheckpointIO


@pytest.fixture(scope="module")
def adapter(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(trained(base), tmp_path_factory.mktemp("run") / "adapter", PRUNED, tiny_processor())


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_carry_the_permissions_that_the_umask_leaves(base: str, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_adapter(trained(base), tmp_path / "adapter", PRUNED, tiny_processor())
        export_merged(tmp_path / "adapter", tmp_path / "merged", max_shard_size="50KB")
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt")
        with atomic_file(tmp_path / "shard.safetensors") as part:
            save_file({"a": torch.zeros(3)}, part)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 15
    assert {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in files} == {
        file.name: oct(0o666 & ~umask) for file in files
    }


def test_leftovers_of_processes_that_are_gone_go_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, gone = storage._HOST, dead_process()
    ours = [f".last.ckpt.{host}@{gone}.tmp", f".config.yaml.{host}@{gone}.old", f".best.ckpt.{gone}.tmp"]
    alive = [f".last.ckpt.{host}@{os.getpid()}.tmp", f".last.ckpt.other-host@{gone}.tmp"]
    others = [
        "last.ckpt.1.tmp",
        ".notes.tmp",
        f".a.{gone}.part",
        ".hidden",
        f"model.{gone}.tmp",
        "config.yaml",
        f".a{gone}.tmp",
    ]
    for name in (*ours, *alive, *others):
        (tmp_path / name).write_text("x")
    folder = tmp_path / f".adapter.{host}@{gone}.tmp"
    folder.mkdir()
    (folder / "a").write_text("x")
    with monkeypatch.context() as other_user:
        other_user.setattr(os, "geteuid", lambda: 4321)
        assert remove_leftovers(tmp_path) == []
    assert {path.name for path in remove_leftovers(tmp_path)} == {*ours, folder.name}
    assert {path.name for path in tmp_path.iterdir()} == {*alive, *others}
    assert socket.gethostname()


def test_folder_moved_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    gone = dead_process()
    aside = tmp_path / f".adapter.{storage._HOST}@{gone}.old"
    aside.mkdir()
    (aside / "a").write_text("old")
    (tmp_path / f".adapter.{storage._HOST}@{gone}.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "a").read_text() == "old"


@pytest.mark.parametrize(("exchanges", "number"), [(True, 1), (True, 2), (False, 1), (False, 2), (False, 3)])
def test_killed_while_an_adapter_is_replaced(tmp_path: Path, exchanges: bool, number: int) -> None:
    """At each of the moves; on systems that can exchange two folders and on those that cannot."""
    target = tmp_path / "adapter"
    with atomic_folder(target) as part:
        (part / "a").write_text("old")
    child = os.fork()
    if not child:
        moves = 0

        def dying(move: Any) -> Any:
            def moved(*args: Any, **kwargs: Any) -> Any:
                nonlocal moves
                moves += 1
                if moves == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return move(*args, **kwargs)

            return moved

        try:
            storage._exchange = dying(storage._exchange) if exchanges else lambda one, other: False
            storage.os.replace = dying(os.replace)
            with atomic_folder(target) as part:
                (part / "a").write_text("new")
                storage.shutil.rmtree = dying(storage.shutil.rmtree)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (target / "a").read_text() in ("old", "new")


def test_export_takes_away_what_its_killed_forerunner_left(adapter: Path, tmp_path: Path) -> None:
    left = tmp_path / f".merged.{storage._HOST}@{dead_process()}.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(1000))
    export_merged(adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("room", [100, 3_000, 20_000])
@pytest.mark.parametrize("what", ["adapter", "adapter anew", "merged"])
def test_full_disk_says_what_was_kept_and_the_way_out(
    base: str, adapter: Path, tmp_path: Path, what: str, room: int
) -> None:
    target, model = tmp_path / "target", trained(base)  # loaded now: its progress is written to a file too
    if what == "adapter":
        save_adapter(model, target, PRUNED, tiny_processor())
    with (
        full_disk(room),
        pytest.raises(OSError, match=r"could not save .*target: .*too large.*Free some space") as error,
    ):
        if what == "adapter":
            save_adapter(model, target, PRUNED, tiny_processor())
        elif what == "merged":
            export_merged(adapter, target)
        else:
            export_adapter(adapter, target)
    assert ("the last good one is still at" in str(error.value)) == (what == "adapter")
    assert [path.name for path in tmp_path.iterdir()] == (["target"] if what == "adapter" else [])
    if what == "adapter":
        load_checkpoint(target)


@pytest.mark.parametrize("number", [1, 13, 30])
def test_folders_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "last.ckpt").write_text("good")
    monkeypatch.setattr(Path, "touch", refused)
    with pytest.raises(OSError, match=r"could not save .*last good one is still at .*Make .* writable"):
        with atomic_file(tmp_path / "last.ckpt", lambda: tmp_path / "last.ckpt"):
            pass


def test_other_errors_are_passed_on_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="base.json"), atomic_folder(tmp_path / "a"):
        (tmp_path / "base.json").read_text()
    assert write_failure(RuntimeError("shape mismatch")) is None and list(tmp_path.iterdir()) == []


def test_recipes_tell_what_a_full_disk_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise OSError(28, "No space left on device", "/results/table.md")

    assert run_command(main, []) == 2
    assert (
        "table.md'. What was saved before, checkpoints and results, is as it was. Free some" in capsys.readouterr().err
    )
