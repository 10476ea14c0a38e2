"""What an adapter is on disk, and how it is read back: from its folder or straight from a training checkpoint.

A training checkpoint holds the trained tensors under the names of the training module; what turns them into a PEFT
folder (PEFT's config, schedule, which base model) lies beside them as plain values under `himap_adapter`. So neither
the base model nor the strategy that trained it is needed to make an adapter of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel, PeftType, __version__, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from himap_train.checkpoints.finite import require_finite
from himap_train.checkpoints.ranking import ranking_of, read_ranking, write_ranking
from himap_train.checkpoints.same_base import base_facts, plain, recorded_name
from himap_train.data.end_of_answer import write_end_tokens
from himap_train.models.families.image_form import write_form
from himap_train.models.model_files import check_files
from himap_train.models.stock import base_model
from himap_train.models.whole import trained_in_place
from himap_train.pruning.reading import schedule_file, schedule_in
from himap_train.pruning.schedule import PruningSchedule
from himap_train.storage import atomic_folder
from himap_train.structured import Rule, check_shape, named, read_json

CHECKPOINT_KEY = "himap_adapter"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SCHEDULE_FILE, BASE_FILE = "pruning.yaml", "base_model.json"
_POSITIVE = Rule("a number above 0", int | float, lambda value: 0 < value < float("inf"))
_RANK = Rule("a whole number above 0", int, lambda value: value > 0)
_NAMES = Rule("text, or a list of texts", str | list, lambda value: all(isinstance(name, str) for name in value))
PEFT_SHAPE = {
    "peft_type": Rule(f"one of {', '.join(kind.value for kind in PeftType)}", str, lambda kind: kind in set(PeftType)),
    "base_model_name_or_path": Rule("the path or hub id of a model", str, bool),
    "r?": _RANK,
    "lora_alpha?": _POSITIVE,
    "lora_dropout?": float,
    "use_rslora?": bool,
    "use_dora?": bool,
    "rank_pattern?": {str: _RANK},
    "alpha_pattern?": {str: _POSITIVE},
    "target_modules?": _NAMES,
    "exclude_modules?": _NAMES,
    "modules_to_save?": _NAMES,
    "layers_to_transform?": int | list,
    "layers_pattern?": _NAMES,
    # PEFT imports the module that is named here
    "megatron_config?": Rule("null: Megatron's layers are not supported", dict, lambda value: False),
}
"""Of `adapter_config.json`, what is used here and what PEFT takes unseen."""
FACTS_SHAPE = {
    "peft": PEFT_SHAPE,
    "schedule": dict,
    "base": Rule("a mapping or null", dict | None, lambda _: True),
    "ranking?": {str: Tensor},
}


@dataclass(frozen=True)
class Adapter:
    """A trained adapter in memory.

    Attributes:
        weights: Tensors under the names of `adapter_model.safetensors`.
        peft: Content of `adapter_config.json`.
        schedule: As it was trained.
        base_facts: What the base model's config was (see `same_base`); None where the folder does not say.
        ranking: Weights of what ranks at learned stages, see `ranking`.
        says_schedule: Whether the schedule was saved with it; PEFT alone saves none.
    """

    weights: dict[str, Tensor]
    peft: dict[str, Any]
    schedule: PruningSchedule
    base_facts: dict[str, Any] | None
    ranking: dict[str, Tensor] = field(default_factory=dict)
    says_schedule: bool = True

    @property
    def base(self) -> str:
        """Path or hub id of the model that it was trained on."""
        return str(self.peft["base_model_name_or_path"])

    def write(self, folder: Path, card: str, processor: Any = None) -> None:
        """Write a PEFT folder; what was there before stays until all is written.

        Args:
            folder: Made, or replaced.
            card: Its README.md.
            processor: Processor of the base model, as `load_processor` gives it; written too where it is given.

        Raises:
            ValueError: A tensor is empty (sharded parameters that nobody gathered).
            NonFiniteError: A tensor holds nan or inf.
            OSError: Nothing could be written; an older folder is untouched.
        """
        empty = [name for name, tensor in self.weights.items() if tensor.numel() == 0]
        if empty:
            raise ValueError(
                f"{len(empty)} tensors to save are empty, the first is {empty[0]}: gather sharded weights first"
            )
        self.require_finite(f"{folder} was not saved: the adapter")
        with atomic_folder(folder) as temporary:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.weights.items()}
            save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            _write_json(temporary / CONFIG_FILE, self.peft)
            _write_json(temporary / BASE_FILE, {"config": self.base_facts})
            text = yaml.safe_dump(self.schedule.to_dict(), sort_keys=False)
            (temporary / SCHEDULE_FILE).write_text(text, encoding="utf-8")
            (temporary / "README.md").write_text(card, encoding="utf-8")
            write_ranking(temporary, self.ranking)
            if processor is not None:
                processor.save_pretrained(str(temporary))
                write_form(temporary, processor)
                write_end_tokens(temporary, processor)

    def require_finite(self, where: str) -> None:
        """Raise NonFiniteError, naming `where` and the tensor, where a weight is nan or inf."""
        way_out = "Its training diverged: take an earlier checkpoint, or train anew with a lower learning rate"
        require_finite((self.weights | self.ranking).items(), where, way_out)


def adapter_facts(model: PeftModel, schedule: PruningSchedule) -> dict[str, Any]:
    """All of an adapter but what PEFT holds: what a training checkpoint keeps under `CHECKPOINT_KEY`."""
    if (config := model.peft_config.get("default")) is None:
        raise ValueError(f"the adapter is called {[*model.peft_config]}; PEFT's files name none: call it 'default'")
    peft = {key: plain(value) for key, value in config.to_dict().items()}
    base = type(base_model(model))
    return {
        "peft": peft
        | {
            "auto_mapping": {"base_model_class": base.__name__, "parent_library": base.__module__},
            "base_model_name_or_path": recorded_name(str(config.base_model_name_or_path)),
            "inference_mode": True,
            "peft_version": __version__,
        },
        "schedule": schedule.to_dict(),
        "base": base_facts(base_model(model).config),
        "ranking": ranking_of(model, schedule),
    }


def adapter_of(model: PeftModel, schedule: PruningSchedule, weights: Mapping[str, Tensor] | None = None) -> Adapter:
    """The adapter of a model in memory; `weights` are its trained parameters where the model holds only parts."""
    # "auto" would ask the hub whether the embeddings were resized
    trained = get_peft_model_state_dict(model, weights, save_embedding_layers=False)
    held = weights or dict(model.named_parameters())
    trained |= {name: held[name] for name in trained_in_place(model)}
    return _adapter(trained, adapter_facts(model, schedule), "the model")


def read_adapter(path: Path) -> Adapter:
    """Read an adapter folder or a training checkpoint file.

    Raises:
        FileNotFoundError: A file of the folder is gone.
        ValueError: The checkpoint has nothing to make an adapter from, or a file is damaged.
    """
    if path.is_file():
        return _from_checkpoint(path)
    check_complete(path)
    check_files(path)
    facts, schedule = path / BASE_FILE, path / SCHEDULE_FILE
    peft = read_json(path / CONFIG_FILE, PEFT_SHAPE)
    with named(path / WEIGHTS_FILE, "is damaged", _OTHER_WAYS):
        weights = load_file(path / WEIGHTS_FILE)
    saved = schedule_file(schedule) if schedule.is_file() else PruningSchedule()
    base = read_json(facts, {"config": FACTS_SHAPE["base"]})["config"] if facts.is_file() else None
    return Adapter(weights, peft, saved, base, read_ranking(path, saved), schedule.is_file())


def check_complete(folder: Path) -> None:
    """Raise where files of an adapter folder are gone.

    A folder without `pruning.yaml` would load and silently be dense. Folders that PEFT alone wrote have none, and no
    `base_model.json` either.

    Raises:
        FileNotFoundError: Names what is there and what is not.
    """
    needed = [CONFIG_FILE, WEIGHTS_FILE, *([SCHEDULE_FILE] if (folder / BASE_FILE).is_file() else [])]
    gone = [name for name in needed if not (folder / name).is_file()]
    if gone:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8])
        raise FileNotFoundError(f"{folder} has no {' and no '.join(gone)} (it holds {found}). {_OTHER_WAYS}")


_OTHER_WAYS = (
    "Pickled adapters are not read. The run's training checkpoint makes an adapter anew: "
    "python recipes/export.py --format adapter --checkpoint RUN/checkpoints/last.ckpt --output FOLDER"
)


def training_file(file: Path) -> dict[str, Any]:
    """What a training checkpoint holds; its tensors stay on the disk until they are used, and nothing is unpickled.

    Raises:
        ValueError: It is none, or is damaged.
    """
    with named(file, "cannot be read as a training checkpoint", "is it complete?"):
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    check_shape(found, {"state_dict": {str: Tensor}}, str(file))
    return found


def _from_checkpoint(file: Path) -> Adapter:
    """Make an adapter of `state_dict` and the facts beside it."""
    checkpoint = training_file(file)
    if CHECKPOINT_KEY not in checkpoint:
        raise ValueError(
            f"{file} does not say which adapter it holds (no {CHECKPOINT_KEY!r}): it was written by an older version. "
            "Export the run's `adapter` folder, or resume the run and let it end"
        )
    check_shape(checkpoint[CHECKPOINT_KEY], FACTS_SHAPE, str(file), CHECKPOINT_KEY)
    weights = {file_name(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    if not weights:
        raise ValueError(f"{file}: `state_dict` is empty; expected the tensors of an adapter")
    return _adapter(weights, checkpoint[CHECKPOINT_KEY], str(file))


def _adapter(weights: dict[str, Tensor], facts: Mapping[str, Any], where: str) -> Adapter:
    schedule = schedule_in(facts["schedule"], where)
    return Adapter(weights, facts["peft"], schedule, facts["base"], facts.get("ranking") or {})


def file_name(parameter: str) -> str:
    """A tensor's name in PEFT's file, from its name in the training module: without the adapter's own name.

    `llava.base_model.model.lm_head.lora_A.default.weight` is `base_model.model.lm_head.lora_A.weight`.
    """
    name = parameter.removeprefix("llava.").replace(".modules_to_save.default.", ".")
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
