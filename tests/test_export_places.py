"""Adapters and exports where a model may be taken for another: places, names, revisions, uploads, files of others."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from export_toys import PRUNED, logits, trained
from peft import LoraConfig, get_peft_model
from recipes_cli import run_recipe
from safetensors.torch import load_file, save_file
from tiny import tiny_processor
from training_toys import save_tiny

from himap_train.checkpoints.agreement import check_agreement
from himap_train.checkpoints.export import export_adapter, export_merged
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.checkpoints.source import adapter_source
from himap_train.models.install import pruning_of, remove_pruning
from himap_train.models.loading import load_llava
from himap_train.storage import atomic_folder
from himap_train.training.init_adapter import processor_of


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, an adapter of it in `adapter`, and that merged in `merged`."""
    folder = tmp_path_factory.mktemp("places")
    base = save_tiny(folder / "base")
    save_adapter(trained(base), folder / "adapter", PRUNED, tiny_processor())
    export_merged(folder / "adapter", folder / "merged")
    return folder


def edited(source: Path, target: Path, **settings: object) -> Path:
    """A copy of an adapter whose PEFT config says something else."""
    shutil.copytree(source, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return target


def by_peft(model: torch.nn.Module, folder: Path) -> Path:
    """As PEFT alone writes it."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tiny_processor().save_pretrained(folder)
    return folder


def test_a_relative_base_is_recorded_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder it would be another model, or a stranger's on the hub."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "models" / "mine")
    save_adapter(trained("models/mine"), tmp_path / "a", PRUNED)
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "models" / "mine")


def test_a_revision_of_the_base_is_not_taken_for_its_newest(places: Path, tmp_path: Path) -> None:
    adapter = edited(places / "adapter", tmp_path / "a", revision="v1")
    for load in (load_checkpoint, lambda path: export_merged(path, tmp_path / "m")):
        with pytest.raises(ValueError, match=r"trained on revision v1 of .*hf download .* --revision v1"):
            load(adapter)
    load_checkpoint(adapter, base=str(places / "base"))
    load_checkpoint(edited(places / "adapter", tmp_path / "b", revision="main"))


def test_an_adapter_over_a_merged_model_keeps_its_schedule(places: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_llava(places / "merged")[0], LoraConfig(r=2, target_modules=["q_proj"]))
    folder = by_peft(model, tmp_path / "a")
    assert pruning_of(load_checkpoint(folder)[0]).schedule == PRUNED  # type: ignore[union-attr]
    merged = export_merged(folder, tmp_path / "m")
    assert json.loads((merged / "config.json").read_text())["himap"] == PRUNED.to_dict()
    export_adapter(folder, tmp_path / "again")
    assert pruning_of(load_checkpoint(tmp_path / "again")[0]).schedule == PRUNED  # type: ignore[union-attr]


def test_an_adapter_that_says_no_schedule_says_that_it_runs_dense(places: Path, tmp_path: Path) -> None:
    model, _ = load_checkpoint(places / "adapter")
    folder = by_peft(model, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"no pruning.yaml, as PEFT alone writes it: it runs dense"):
        load_checkpoint(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_checkpoint(folder, schedule=PRUNED)
        load_checkpoint(places / "adapter")


def test_names_of_earlier_releases_are_loaded(places: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(places / "adapter", old)
    renames = {"model.language_model.": "language_model.model."}
    renames["model.multi_modal_projector."] = "multi_modal_projector."
    weights = {}
    for name, value in load_file(old / "adapter_model.safetensors").items():
        inner = name.removeprefix("base_model.model.")
        for now, then in renames.items():
            inner = inner.replace(now, then, 1) if inner.startswith(now) else inner
        weights[f"base_model.model.{inner}"] = value
    assert weights.keys().isdisjoint(load_file(places / "adapter" / "adapter_model.safetensors"))
    save_file(weights, old / "adapter_model.safetensors", metadata={"format": "pt"})
    expected, found = (logits(load_checkpoint(path)[0]) for path in (places / "adapter", old))
    assert torch.equal(found, expected)
    assert check_agreement(old, export_merged(old, tmp_path / "m")).dense < 1e-4


def test_going_on_from_an_adapter_takes_its_chat_template(places: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "a"
    shutil.copytree(places / "adapter", adapter)
    template = "NEW {{ messages[0]['role'] }}" + tiny_processor().chat_template
    (adapter / "chat_template.jinja").write_text(template)
    assert processor_of(str(places / "base"), str(adapter)).chat_template == template
    assert processor_of(str(places / "base")).chat_template != template


def test_a_copy_of_tied_embeddings_is_not_merged_into_the_head(tmp_path: Path) -> None:
    model, processor = load_llava(save_tiny(tmp_path / "made"))
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base, _ = load_llava(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(ValueError, match=r"a copy of the embeddings, to which lm_head is tied"):
        export_merged(by_peft(adapted, tmp_path / "a"), tmp_path / "m", base=str(tmp_path / "base"))
    assert not (tmp_path / "m").exists()


def test_files_narrower_than_their_config_are_compared_as_such(tmp_path: Path) -> None:
    """As those of the embedded models: fp16 on disk, loaded as fp32."""
    base = Path(save_tiny(tmp_path / "base"))
    file = base / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    save_adapter(trained(str(base)), tmp_path / "a", PRUNED, tiny_processor())
    merged = export_merged(tmp_path / "a", tmp_path / "m")
    assert {value.dtype for value in load_file(merged / "model.safetensors").values()} == {torch.float16}
    assert check_agreement(tmp_path / "a", merged).tolerance == 1e-2


def test_of_one_file_and_shards_that_is_exported_which_transformers_loads(places: Path, tmp_path: Path) -> None:
    other = export_merged(places / "adapter", tmp_path / "other", max_shard_size="100KB")
    both = tmp_path / "both"
    shutil.copytree(places / "base", both)
    for file in other.glob("model*.safetensors*"):
        shutil.copy(file, both)
    assert (both / "model.safetensors.index.json").is_file()
    written = load_file(export_merged(both, tmp_path / "m") / "model.safetensors")
    assert all(torch.equal(value, written[name]) for name, value in load_file(both / "model.safetensors").items())
    found = remove_pruning(load_checkpoint(both)[0])
    assert torch.equal(logits(found), logits(load_llava(places / "base")[0]))


def test_an_older_adapter_is_exported_with_the_whole_path_of_its_base(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places)
    old = edited(places / "adapter", tmp_path / "a", base_model_name_or_path="base")
    written = json.loads((export_adapter(old, tmp_path / "out") / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(places / "base")


def test_a_link_is_followed_to_its_disk_and_stays(places: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    export_merged(places / "adapter", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "real" / "config.json").is_file()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "link"]
    others = [tmp_path / ".notes.20240101.tmp", tmp_path / ".bashrc.20240101.old"]
    for other in others:
        other.touch()
    export_merged(places / "adapter", tmp_path / "beside")
    assert all(other.exists() for other in others)  # hidden files of others are none of ours


def test_a_mount_point_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    with (
        pytest.raises(ValueError, match="is a mount point.* give a folder inside it"),
        atomic_folder(tmp_path / "volume"),
    ):
        pytest.fail("nothing may be written")


def test_what_came_into_the_folder_meanwhile_is_not_lost(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from himap_train.checkpoints import export

    write = export.write_shards

    def slow(*given: object) -> None:
        write(*given)  # type: ignore[arg-type]
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "precious.txt").write_text("mine")

    monkeypatch.setattr(export, "write_shards", slow)
    with pytest.raises(FileExistsError, match="is not empty"):
        export_merged(places / "adapter", tmp_path / "m")
    assert [entry.name for entry in (tmp_path / "m").iterdir()] == ["precious.txt"]


def test_weights_of_a_run_are_not_looked_for_elsewhere(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in ("adapter", "merged"):
        with pytest.raises(ValueError, match=r"--weights best is for the folder of a run"):
            adapter_source(places / source, "best")
    for source in ("embedded", "me/adapter", "runs/none"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {source} of a run"):
            adapter_source(source, "best")
    with pytest.raises(ValueError, match=r"a file of weights alone; give its folder"):
        adapter_source(places / "adapter" / "adapter_model.safetensors")
    options = ["--checkpoint", places / "adapter", "--weights", "last", "--output", places / "no"]
    assert run_recipe("export", *options) == 2 and "is for the folder of a run" in capsys.readouterr().err


def test_a_whole_model_beside_checkpoints_of_others_is_a_whole_model(places: Path, tmp_path: Path) -> None:
    shutil.copytree(places / "merged", tmp_path / "m")
    (tmp_path / "m" / "checkpoints").mkdir()
    assert adapter_source(tmp_path / "m") is None


def test_a_link_out_of_an_adapters_folder_is_refused(places: Path, tmp_path: Path) -> None:
    shutil.copytree(places / "adapter", tmp_path / "a")
    (tmp_path / "secret.txt").write_text("{{ 'secret' }}")
    (tmp_path / "a" / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "a" / "chat_template.jinja").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        load_checkpoint(tmp_path / "a")


def test_a_model_written_anew_keeps_its_card(places: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(places / "merged", source)
    (source / "README.md").write_text("# What I wrote about it\n")
    half = export_merged(source, tmp_path / "half", dtype="bfloat16")
    assert (half / "README.md").read_text() == "# What I wrote about it\n"
    (source / "README.md").write_bytes("caf\u00e9".encode("latin-1"))
    assert (export_merged(source, tmp_path / "again") / "README.md").read_bytes() == b"caf\xe9"


def test_an_adapter_in_the_cache_of_the_hub_is_loaded_by_its_name(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, commit = tmp_path / "models--me--adapter", "0" * 40
    shutil.copytree(places / "adapter", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected, found = (logits(load_checkpoint(path)[0]) for path in (places / "adapter", "me/adapter"))
    assert torch.equal(found, expected)
    (cache / "snapshots" / commit / "config.json").write_text("{}")  # of a model that was there before
    assert adapter_source("me/adapter") == cache / "snapshots" / commit
    for name in ("runs/llava 7b", "runs/llava--7b", "runs/caf\u00e9", "a/.."):
        with pytest.raises(FileNotFoundError, match="neither in the local cache nor reachable|there is no folder"):
            load_checkpoint(name)


def test_a_base_that_is_not_there_is_named_beside_the_recorded_one(places: Path, tmp_path: Path) -> None:
    lost = edited(places / "adapter", tmp_path / "a", base_model_name_or_path="/gone/base")
    with pytest.raises(FileNotFoundError, match=r"trained on '/gone/base', which cannot.*`base_model_name_or_path`"):
        load_checkpoint(lost)
    with pytest.raises(FileNotFoundError, match=r"trained on '/gone/base', and base='/other' cannot"):
        load_checkpoint(lost, base="/other")
