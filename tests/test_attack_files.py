"""Malformed schedules, configs, adapters and checkpoints: status 2, one line that names file or key; nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import harmless, in_little_memory, the_error
from export_toys import trained
from recipes_cli import run_recipe
from safetensors.torch import load_file, save_file
from training_toys import run_main, save_tiny

from himap_train.checkpoints.adapter import adapter_facts
from himap_train.checkpoints.load import load_checkpoint, save_adapter
from himap_train.limits import bounded
from himap_train.pruning.reading import read_schedule
from himap_train.structured import read_json, read_yaml

MEGABYTES = 700
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
OBJECT = '!!python/object/apply:os.system ["touch executed"]'
STAGE = "{{layer: 2, criterion: instruction, keep_ratio: {}}}"


class Runs:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


# of files that must hold a mapping, whatever for
YAML: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "x.yaml is empty; expected a mapping"),
    "comments": ("# nothing\n---\n", "x.yaml is empty; expected a mapping"),
    "scalar": ("himap", "x.yaml is str 'himap'; expected a mapping"),
    "number": ("5", "x.yaml is int 5; expected a mapping"),
    "list": ("[1, 2]", r"x.yaml is list \[1, 2\]; expected a mapping"),
    "invalid": ("stages: [", r"x.yaml is not YAML of plain values \(expected the node content.* at line 1, column 10"),
    "tabs": ("\tstages: []", "x.yaml is not YAML"),
    "two documents": ("stages: []\n---\nstages: []\n", "x.yaml is not YAML.* line 2"),
    "object": (f"stages: {OBJECT}", r"x.yaml is not YAML.*python/object/apply:os.system.* at line 1"),
    "name": ("stages: !!python/name:os.system", "x.yaml is not YAML.*python/name"),
    "own tag": ("stages: !mine []", "x.yaml is not YAML.*!mine"),
    "a key twice": ("stages: []\nstages: []", "x.yaml .*the key 'stages' twice"),
    "a key twice, deep": ("stages: [{layer: 2, layer: 3}]", "x.yaml .*the key 'layer' twice"),
    "list as a key": ("? [a]\n: b", "x.yaml is not YAML.*unhashable key"),
    "binary": (b"\x80\x81\x00\xff", "x.yaml is not UTF-8 text"),
    "zeros": (bytes(999), "x.yaml is not YAML.*special characters"),
    "latin": ("a: é".encode("latin-1"), "x.yaml is not UTF-8 text"),
    "UTF-16": ("stages: []".encode("utf-16"), "x.yaml is not UTF-8 text"),
    "pickle": (pickle.dumps(Runs()), "x.yaml is not"),
    "aliases without end": (BOMB, "x.yaml .*more than 100000 values"),
    "aliases in merges": (BOMB + "b:\n  <<: [*a9, *a9]\n", "x.yaml .*more than 100000 values"),
    "alias to itself": ("stages: &a [*a]", "x.yaml .*more than 100000 values"),
    "no such alias": ("stages: *a", "x.yaml is not YAML.*undefined alias"),
    "deep": ("[" * 50_000, "x.yaml is not YAML.*nested too deeply"),
    "deep objects": ("stages: " + "{a: " * 50_000, "x.yaml is not YAML.*nested too deeply"),
    "long": ("stages: []\n#" + "x" * 2**21, "x.yaml has 2097164 bytes; at most"),
    "5000 digits": ("stages: " + "9" * 5000, "x.yaml is not YAML.*4300"),
    "no date": ("stages: 2026-99-99", "x.yaml is not YAML.*month"),
}

SCHEDULES: dict[str, tuple[str, str]] = {
    "ratio 1e300": (f"stages: [{STAGE.format('1e300')}]", "x.yaml .*keep_ratio is 1e[+]300; expected 0 to 1"),
    "ratio infinite": (f"stages: [{STAGE.format('.inf')}]", "x.yaml .*keep_ratio is inf"),
    "ratio NaN": (f"stages: [{STAGE.format('.nan')}]", "x.yaml .*keep_ratio is nan"),
    "ratio as text": (f"stages: [{STAGE.format('half')}]", "x.yaml .*the ratio is 'half'; expected a number"),
    "ratio true": (f"stages: [{STAGE.format('true')}]", "x.yaml .*the ratio is True; expected a number"),
    "ratio a list": (f"stages: [{STAGE.format('[0.5]')}]", r"x.yaml .*the ratio is \[0.5\]; expected a number"),
    "ratio null": (f"stages: [{STAGE.format('null')}]", "x.yaml .*give exactly one of them"),
    "stages 5": ("stages: 5", "x.yaml .*`stages` is int 5; expected a list"),
    "stages a mapping": ("stages: {layer: 2}", "x.yaml .*`stages` is dict .*; expected a list"),
    "stages a text": ("stages: himap", "x.yaml .*`stages` is str 'himap'; expected a list"),
    "stage 5": ("stages: [5]", r"x.yaml .*stages\[0\] is 5; expected a mapping"),
    "stage null": ("stages: [null]", r"x.yaml .*stages\[0\] is None; expected a mapping"),
    "stage of numbers": ("stages: [{1: 2, b: 3}]", r"x.yaml .*stages\[0\] has the unknown key 1"),
    "no criterion": ("stages: [{layer: 2, keep_ratio: 0.5}]", r"x.yaml .*stages\[0\] has no 'criterion'"),
    "preset a list": ("preset: [1]", r"x.yaml .*`preset` is list \[1\]; expected text"),
    "preset of nobody": ("preset: himpa", "x.yaml .*preset 'himpa' is unknown; did you mean 'himap'"),
    "preset and more": ("{preset: himap, stages: []}", "x.yaml .*unknown key 'preset'"),
    "layer as text": ("stages: [{layer: two, criterion: image, keep_ratio: 0.5}]", "x.yaml .*stage layer is 'two'"),
    "layer 1e3": ("stages: [{layer: 1e3, criterion: image, keep_ratio: 0.5}]", "x.yaml .*stage layer is 1000.0"),
    "criterion a list": ("stages: [{layer: 2, criterion: [image], keep_ratio: 0.5}]", "x.yaml .*criterion .* unknown"),
    "criterion null": ("stages: [{layer: 2, criterion: null, keep_ratio: 0.5}]", "x.yaml .*has no criterion"),
    "count as text": ("stages: [{layer: 2, criterion: image, keep_count: x}]", "x.yaml .*keep_count is 'x'"),
    "count 10**20": (f"stages: [{{layer: 2, criterion: image, keep_count: {10**20}}}]", "x.yaml .*keep_count is 10+;"),
    "count 1.5": ("stages: [{layer: 2, criterion: image, keep_count: 1.5}]", "x.yaml .*keep_count is 1.5"),
    "mass a list": ("stages: [{layer: 2, criterion: image, keep: [0.9]}]", r"x.yaml .*keep is \[0.9\]; expected a map"),
    "mass as text": ("stages: [{layer: 2, criterion: image, keep: {mass: x}}]", "x.yaml .*mass is 'x'"),
    "positions a list": ("{stages: [], positions: [keep]}", r"x.yaml .*positions is \['keep'\]"),
    "enter as text": ("{stages: [], enter: x}", "x.yaml .*enter is 'x'"),
    "unknown key": ("{stages: [], staegs: 1}", "x.yaml .*unknown key 'staegs'; did you mean 'stages'"),
    "too deep for it": ("stages: [{layer: 99, criterion: image, keep_ratio: 0.5}]", "layer 99, but the decoder has"),
}

CONFIGS: dict[str, tuple[str, str]] = {
    "unknown key": ("nonsense: 1", "nonsense"),
    "a number as a key": ("5: 1", "error: .*5"),
    "null as a key": ("null: 1", "error: "),
    "wrong type": ("{output: [1]}", "output"),
    "mapping for a number": ("{seed: {a: 1}, seed_everything: {a: 1}}", "seed"),
}


def adapter(key: str, value: Any) -> Callable[[Path], None]:
    """`adapter_config.json` with another value."""
    return edited("adapter/adapter_config.json", key, value)


def edited(name: str, key: str, value: Any) -> Callable[[Path], None]:
    """A JSON file with another value under a dotted key; without the key where the value is `...`."""

    def do(folder: Path) -> None:
        content = inner = json.loads((folder / name).read_text())
        *above, last = key.split(".")
        for part in above:
            inner = inner[part]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
        (folder / name).write_text(json.dumps(content))

    return do


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return do


def after(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    """One step after the other."""

    def do(folder: Path) -> None:
        for step in steps:
            step(folder)

    return do


def gone(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def linked(name: str, target: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return do


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """The adapter's tensors, changed."""

    def do(folder: Path) -> None:
        file = folder / "adapter/adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return do


def header(name: str, text: bytes, length: int | None = None) -> Callable[[Path], None]:
    return written(name, struct.pack("<Q", len(text) if length is None else length) + text + bytes(64))


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-50]) and None


def checkpoint(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The training checkpoint, changed; or something else in its place."""

    def do(folder: Path) -> None:
        found = torch.load(folder / "x.ckpt", weights_only=True)
        other = change(found)
        torch.save(found if other is None else other, folder / "x.ckpt")

    return do


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if "lora_A" in name)


BACKTRACKS = r"(.*a|.*b|.*c|.*)*(.*)*(\w+\.?)*x"
ADAPTER = "adapter_config.json.?:? "
ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "config a list": (
        written("adapter/adapter_config.json", "[]"),
        r"adapter_config.json is list \[\]; expected a map",
    ),
    "config empty": (written("adapter/adapter_config.json", ""), "adapter_config.json is not JSON"),
    "config binary": (written("adapter/adapter_config.json", b"\x80\x04"), "adapter_config.json is not UTF-8"),
    "config deep": (written("adapter/adapter_config.json", "[" * 100_000), "adapter_config.json is not JSON.*deep"),
    "a key twice": (written("adapter/adapter_config.json", '{"r": 1, "r": 2}'), "adapter_config.json .*'r' twice"),
    "no base": (adapter("base_model_name_or_path", ...), ADAPTER + "no key `base_model_name_or_path`"),
    "base null": (adapter("base_model_name_or_path", None), "`base_model_name_or_path` is empty; expected the path"),
    "base a list": (adapter("base_model_name_or_path", ["a"]), "`base_model_name_or_path` is list"),
    "base gone": (adapter("base_model_name_or_path", "/nowhere/base"), "was trained on '/nowhere/base', which cannot"),
    "base on the hub": (adapter("base_model_name_or_path", "o/name"), "was trained on 'o/name', which cannot"),
    "base not loadable": (adapter("base_model_name_or_path", "x\0y"), "adapter was trained on 'x.*y', which cannot"),
    "no type": (adapter("peft_type", ...), ADAPTER + "no key `peft_type`"),
    "type of nobody": (adapter("peft_type", "NEWEST"), ADAPTER + "`peft_type` is str 'NEWEST'; expected one of"),
    "type a list": (adapter("peft_type", ["LORA"]), "`peft_type` is list"),
    "another type": (adapter("peft_type", "IA3"), "error: "),
    "alpha as text": (adapter("lora_alpha", "16"), "`lora_alpha` is str '16'; expected a number above 0"),
    "alpha NaN": (adapter("lora_alpha", float("nan")), "`lora_alpha` is float nan"),
    "alpha 0": (adapter("lora_alpha", 0), "`lora_alpha` is int 0; expected a number above 0"),
    "rank missing": (adapter("r", ...), "size mismatch|shape|no key `r`"),
    "rank 0": (adapter("r", 0), "`r` is int 0; expected a whole number above 0"),
    "rank 4.5": (adapter("r", 4.5), "`r` is float 4.5; expected a whole number above 0"),
    "rank true": (adapter("r", True), "`r` is bool True"),
    "another rank": (adapter("r", 7), "size mismatch|shape"),
    "rank of 10**12": (adapter("r", 10**12), "error: "),
    "ranks a list": (adapter("rank_pattern", [1]), r"`rank_pattern` is list \[1\]; expected a mapping"),
    "ranks as text": (adapter("rank_pattern", {"q": "x"}), "`rank_pattern.q` is str 'x'; expected a whole number"),
    "dropout as text": (adapter("lora_dropout", "x"), "`lora_dropout` is str 'x'; expected a number"),
    "targets a number": (adapter("target_modules", 5), "`target_modules` is int 5; expected text, or a list"),
    "targets of numbers": (adapter("target_modules", [5]), r"`target_modules` is list \[5\]; expected text, or a list"),
    "targets of nobody": (
        adapter("target_modules", ["nobody"]),
        "adapter is no adapter of its base model .*target_modules",
    ),
    "no expression": (adapter("target_modules", "(("), r"has a `target_modules` that is no regular expression"),
    "backtracking": (adapter("target_modules", BACKTRACKS), "`target_modules` did not end within 3 s"),
    "backtracking ranks": (adapter("rank_pattern", {BACKTRACKS: 4}), "`rank_pattern` did not end within 3 s"),
    "Megatron": (
        lambda folder: (adapter("megatron_config", {})(folder), adapter("megatron_core", "executes")(folder)) and None,
        "`megatron_config` is dict {}; expected null",
    ),
    "facts a list": (written("adapter/base_model.json", "[]"), r"base_model.json is list \[\]; expected a mapping"),
    "facts without": (written("adapter/base_model.json", "{}"), "base_model.json: no key `config`"),
    "facts as text": (written("adapter/base_model.json", '{"config": "x"}'), "base_model.json: `config` is str 'x'"),
    "facts invalid": (written("adapter/base_model.json", "{"), "base_model.json is not JSON"),
    "schedule empty": (written("adapter/pruning.yaml", ""), "pruning.yaml is empty"),
    "schedule tagged": (written("adapter/pruning.yaml", f"stages: {OBJECT}"), "pruning.yaml is not YAML"),
    "schedule bomb": (written("adapter/pruning.yaml", BOMB), "pruning.yaml .*more than 100000"),
    "schedule deeper": (
        written("adapter/pruning.yaml", "stages: [{layer: 9, criterion: image, keep_ratio: 0.5}]"),
        "adapter was saved with a schedule that does not fit .*layer 9, but the decoder has layers 0 to 5",
    ),
    "no schedule": (gone("adapter/pruning.yaml"), "has no pruning.yaml"),
    "weights cut": (cut("adapter/adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
    "weights empty": (written("adapter/adapter_model.safetensors", ""), "adapter_model.safetensors is damaged"),
    "header of 10 GB": (
        header("adapter/adapter_model.safetensors", b"{}", 10**10),
        "adapter_model.safetensors is damaged",
    ),
    "header a list": (header("adapter/adapter_model.safetensors", b"[]      "), "adapter_model.safetensors is damaged"),
    "size NaN": (
        header("adapter/adapter_model.safetensors", b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,64]}}'),
        "adapter_model.safetensors is damaged",
    ),
    "dtype of nobody": (
        header("adapter/adapter_model.safetensors", b'{"a":{"dtype":"F5","shape":[16],"data_offsets":[0,64]}}'),
        "adapter_model.safetensors is damaged",
    ),
    "no tensors": (weights(lambda tensors: tensors.clear()), "adapter is no adapter of its base model .*projector"),
    "wrong shape": (weights(lambda t: t.update({first(t): torch.zeros(3, 5)})), "size mismatch|shape"),
    "text alone": (gone("adapter/adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "pickle alone": (
        after(gone("adapter/adapter_model.safetensors"), written("adapter/adapter_model.bin", pickle.dumps(Runs()))),
        "has no adapter_model.safetensors .*Pickled adapters are not read",
    ),
}
CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle": (written("x.ckpt", pickle.dumps(Runs())), "x.ckpt cannot be read as a training checkpoint"),
    "torch and a pickle": (checkpoint(lambda _: Runs()), "x.ckpt cannot be read as a training checkpoint"),
    "empty": (written("x.ckpt", ""), "x.ckpt cannot be read"),
    "text": (written("x.ckpt", "state_dict"), "x.ckpt cannot be read"),
    "cut off": (cut("x.ckpt"), "x.ckpt cannot be read"),
    "a list": (checkpoint(lambda _: [1]), r"x.ckpt is list \[1\]; expected a mapping"),
    "a tensor": (checkpoint(lambda _: torch.zeros(2)), "x.ckpt is Tensor .*; expected a mapping"),
    "no state_dict": (checkpoint(lambda c: c.pop("state_dict") and None), "x.ckpt: no key `state_dict`"),
    "state_dict a list": (checkpoint(lambda c: c.update(state_dict=[1])), "x.ckpt: `state_dict` is list"),
    "state_dict of text": (checkpoint(lambda c: c.update(state_dict={"a": "b"})), "`state_dict.a` is str 'b'"),
    "no facts": (checkpoint(lambda c: c.pop("himap_adapter") and None), "no 'himap_adapter'"),
    "state_dict empty": (checkpoint(lambda c: c.update(state_dict={})), "x.ckpt: `state_dict` is empty"),
    "facts as text": (checkpoint(lambda c: c.update(himap_adapter="x")), "`himap_adapter` is str 'x'; expected a map"),
    "facts null": (checkpoint(lambda c: c.update(himap_adapter=None)), "`himap_adapter` is empty"),
    "facts empty": (checkpoint(lambda c: c.update(himap_adapter={})), "`himap_adapter` has no key `peft`"),
    "schedule as text": (
        checkpoint(lambda c: c["himap_adapter"].update(schedule="himap")),
        "`himap_adapter.schedule` is str 'himap'; expected a mapping",
    ),
    "schedule wrong": (checkpoint(lambda c: c["himap_adapter"].update(schedule={"stages": 5})), "x.ckpt .*`stages`"),
    "alpha as text": (
        checkpoint(lambda c: c["himap_adapter"]["peft"].update(lora_alpha="16")),
        "x.ckpt: `himap_adapter.peft.lora_alpha` is str '16'",
    ),
}
ENDLESS = "{% for i in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3


def indexed(content: str) -> Any:
    """Shards in place of the one file, which comes before them."""
    return after(gone("model/model.safetensors"), written("model/model.safetensors.index.json", content))


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "config a list": (written("model/config.json", "[]"), r"config.json is list \[\]; expected a mapping"),
    "config no JSON": (written("model/config.json", "model_type: llava"), "config.json is not JSON"),
    "config binary": (written("model/config.json", b"\x80\x81"), "config.json is not UTF-8"),
    "config gone": (gone("model/config.json"), "has no config.json"),
    "no type": (edited("model/config.json", "model_type", ...), "config.json: no key `model_type`"),
    "type a list": (edited("model/config.json", "model_type", ["llava"]), "`model_type` is list"),
    "type of nobody": (edited("model/config.json", "model_type", "llava9000"), "model.*llava9000"),
    "type of others": (edited("model/config.json", "model_type", "gpt2"), "model.*gpt2|model.*original"),
    "decoder of nobody": (edited("model/config.json", "text_config.model_type", "nobody"), "config.json .*nobody"),
    "own code": (
        lambda folder: (
            (
                edited("model/config.json", "model_type", "mine")(folder),
                edited("model/config.json", "auto_map", {"AutoConfig": "mine.Config"})(folder),
                written("model/mine.py", "open('executed', 'w')")(folder),
            )
            and None
        ),
        "config.json is no configuration of a model .*custom code",
    ),
    "decoder a list": (edited("model/config.json", "text_config", []), "`text_config` is list"),
    "layers as text": (edited("model/config.json", "text_config.num_hidden_layers", "six"), "num_hidden_layers"),
    "layers 10**8": (
        edited("model/config.json", "text_config.num_hidden_layers", 10**8),
        "`text_config.num_hidden_",
    ),
    "tower of 10**8": (
        edited("model/config.json", "vision_config.num_hidden_layers", 10**8),
        "`vision_config.num_hidd",
    ),
    "rows 10**12": (edited("model/config.json", "text_config.vocab_size", 10**12), "`text_config.vocab_size` is int 1"),
    "tower's layer": (edited("model/config.json", "vision_feature_layer", 99), "`vision_feature_layer` is 99"),
    "activation": (edited("model/config.json", "text_config.hidden_act", "zz"), "`text_config.hidden_act` is str 'zz'"),
    "image token": (edited("model/config.json", "image_token_id", 7), "writes images as token 4, and .* is 7"),
    "image token, text": (edited("model/config.json", "image_token_id", "x"), "`image_token_id` is str 'x'"),
    "patch as text": (edited("model/processor_config.json", "patch_size", "x"), "`patch_size` is str 'x'"),
    "patch 0": (edited("model/processor_config.json", "patch_size", 0), "`patch_size` is int 0"),
    "layers -1": (edited("model/config.json", "text_config.num_hidden_layers", -1), "model"),
    "width 0": (edited("model/config.json", "text_config.hidden_size", 0), "model"),
    "heads 0": (edited("model/config.json", "text_config.num_attention_heads", 0), "model"),
    "another width": (
        edited("model/config.json", "text_config.hidden_size", 64),
        "model has .* weights of other shapes .*first is .*weight",
    ),
    "architectures": (edited("model/config.json", "architectures", "LlavaX"), "`architectures` is str"),
    "himap as text": (edited("model/config.json", "himap", "himap"), "config.json: `himap` is str 'himap'"),
    "himap a list": (edited("model/config.json", "himap", [1]), "config.json: `himap` is list"),
    "himap wrong": (edited("model/config.json", "himap", {"stages": 5}), "config.json.* `stages` is int 5"),
    "himap deeper": (
        edited("model/config.json", "himap", {"stages": [{"layer": 9, "criterion": "image", "keep_ratio": 0.5}]}),
        "model was saved with a schedule that does not fit .*layer 9",
    ),
    "generation a list": (written("model/generation_config.json", "[]"), "generation_config.json is list"),
    "generation no JSON": (written("model/generation_config.json", "{"), "generation_config.json is not JSON"),
    "generation wrong": (edited("model/generation_config.json", "eos_token_id", "x"), "`eos_token_id` is str 'x'"),
    "no tokenizer": (gone("model/tokenizer.json", "model/tokenizer_config.json"), "model has no usable processor"),
    "tokenizer a list": (written("model/tokenizer.json", "[]"), "tokenizer.json is list"),
    "tokenizer empty": (written("model/tokenizer.json", "{}"), "tokenizer.json: no key `model`"),
    "tokenizer null": (edited("model/tokenizer.json", "model.vocab", None), "model has no usable processor"),
    "tokenizer config": (written("model/tokenizer_config.json", "5"), "tokenizer_config.json is int 5"),
    "processor a list": (written("model/processor_config.json", "[]"), "processor_config.json is list"),
    "no processor": (gone("model/processor_config.json"), "model has no usable processor"),
    "vocabulary": (edited("model/config.json", "text_config.vocab_size", 200), "200|size mismatch"),
    "template a list": (
        lambda folder: (
            (
                gone("model/chat_template.jinja")(folder),
                edited("model/tokenizer_config.json", "chat_template", [1])(folder),
            )
            and None
        ),
        "model.*chat.template|model has no usable processor",
    ),
    "template a number": (edited("model/tokenizer_config.json", "chat_template", 5), "`chat_template` is int 5"),
    "template binary": (written("model/chat_template.jinja", b"\x80\x81"), "chat_template.jinja is not UTF-8"),
    "template invalid": (written("model/chat_template.jinja", "{% for %}"), "chat template in .*model cannot be used"),
    "template, long": (
        written("model/chat_template.jinja", "{% for i in range(10**9) %}x{% endfor %}"),
        "chat template in .*model cannot be used: Range too big",
    ),
    "template, endless": (
        written("model/chat_template.jinja", ENDLESS),
        "chat template in .*model (did not end within|takes too much memory)",
    ),
    "template, doubling": (
        written(
            "model/chat_template.jinja",
            "{% set n = namespace(x='x' * 9999) %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        ),
        "chat template in .*model takes too much memory",
    ),
    "template, huge": (written("model/chat_template.jinja", "{{ 'x' * 10**11 }}"), "takes too much memory"),
    "template, code": (
        written(
            "model/chat_template.jinja",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}"
            "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
        ),
        "error: ",
    ),
    "weights cut": (cut("model/model.safetensors"), "model.safetensors is damaged or incomplete"),
    "weights empty": (written("model/model.safetensors", ""), "model.safetensors is damaged or incomplete"),
    "header of 10 GB": (header("model/model.safetensors", b"{}", 10**10), "model.safetensors is damaged"),
    "size NaN": (
        header("model/model.safetensors", b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,64]}}'),
        "model.safetensors is damaged",
    ),
    "dtype of nobody": (
        header("model/model.safetensors", b'{"a":{"dtype":"F5","shape":[16],"data_offsets":[0,64]}}'),
        "model.safetensors is damaged",
    ),
    "no weights": (gone("model/model.safetensors"), "has no model.safetensors"),
    "pickle alone": (
        after(gone("model/model.safetensors"), written("model/pytorch_model.bin", pickle.dumps(Runs()))),
        "its weights are pickled",
    ),
    "index a list": (indexed("[]"), "index.json is list"),
    "index without": (indexed("{}"), "index.json: no key `weight_map`"),
    "index of numbers": (
        indexed('{"weight_map": {"a": 5}}'),
        "index.json: `weight_map.a` is int 5",
    ),
    "index outside": (
        indexed('{"weight_map": {"a": "../x.safetensors"}}'),
        "`weight_map.a` is str '../x.safetensors'; expected the name of a ",
    ),
    "index absolute": (
        indexed('{"weight_map": {"a": "/x.safetensors"}}'),
        "`weight_map.a` is str '/x.safetensors'; expected the name of a ",
    ),
    "index of a pickle": (
        indexed('{"weight_map": {"a": "a.bin"}}'),
        "`weight_map.a` is str 'a.bin'",
    ),
    "shard gone": (
        indexed('{"weight_map": {"a": "a.safetensors"}}'),
        "lacks 1 of its weight files, the first is a.safetensors",
    ),
    "text out": (linked("model/chat_template.jinja", "/etc/hostname"), "chat_template.jinja is a link out of its"),
    "device": (linked("model/generation_config.json", "/dev/zero"), "generation_config.json"),
    "link to itself": (linked("model/model.safetensors", "model.safetensors"), "has no model.safetensors"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of it, and a training checkpoint with what is needed to make that adapter."""
    folder = tmp_path_factory.mktemp("whole")
    model = trained(save_tiny(folder / "model"))
    schedule = read_schedule({"stages": [{"layer": 2, "criterion": "instruction", "keep_ratio": 0.5}]})
    save_adapter(model, folder / "adapter", schedule)
    state = {f"llava.{name}": value for name, value in model.named_parameters() if value.requires_grad}
    torch.save({"state_dict": state, "himap_adapter": adapter_facts(model, schedule)}, folder / "x.ckpt")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of them to spoil; the adapter's base stays whole."""
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(autouse=True)
def within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], message: str, recipe: str, *options: object) -> None:
    """Status 2 and one line that fits the pattern, without a traceback, in bounded time and memory; nothing is run."""
    capsys.readouterr()
    with harmless(Path.cwd(), MEGABYTES):
        status = run(recipe, *options)
    check_refused(status, capsys.readouterr().err, message)


def run(recipe: str, *options: object) -> int:
    try:
        own = recipe in ("finetune", "plan")
        return run_main(recipe, *map(str, options)) if own else run_recipe(recipe, *options)
    except SystemExit as end:
        return int(str(end.code))


def check_refused(status: int, text: str, message: str) -> None:
    the_error(status, text)
    assert re.search(message, text[text.index("error: ") :], re.DOTALL), text


@pytest.mark.parametrize("name", YAML)
def test_a_file_that_is_no_mapping(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a schedule and as a config."""
    content, message = YAML[name]
    file = tmp_path / "x.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(capsys, message, "generate", "--schedule", file)
    refused(capsys, message, "evaluate", "--config", file)
    refused(capsys, message, "finetune", "--config", file)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_bad_schedule(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = SCHEDULES[name]
    (tmp_path / "x.yaml").write_text(text)
    refused(capsys, message, "generate", "--schedule", tmp_path / "x.yaml")
    inline = message.replace("x.yaml .*", "").replace("key 1", "key .?1")
    refused(capsys, inline, "generate", "--schedule", text)


@pytest.mark.parametrize(
    "recipe", ["finetune", "evaluate", "generate", "export", "plan", "search_schedule", "benchmark"]
)
def test_a_bad_config(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    for text, message in CONFIGS.values():
        file.write_text(text)
        refused(capsys, message, recipe, "--config", file)
    for content, message in (YAML[name] for name in ("empty", "object", "aliases without end", "binary", "deep")):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        refused(capsys, message, recipe, "--config", file)
        refused(capsys, message, recipe, f"--config={file}")
    refused(capsys, "gone.yaml does not exist", recipe, "--config", tmp_path / "gone.yaml")
    (tmp_path / "folder.yaml").mkdir()
    refused(capsys, "folder.yaml is a folder; expected a file", recipe, "--config", tmp_path / "folder.yaml")


@pytest.mark.parametrize("group", ["model", "data", "pruning", "evaluation"])
def test_a_group_in_a_file_of_its_own(group: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (BOMB, f"path: {OBJECT}", "{a: " * 50_000, "path: a\npath: b"):
        (tmp_path / "x.yaml").write_text(text)
        refused(capsys, f"{group}|x.yaml", "finetune", f"--{group}", tmp_path / "x.yaml")


@pytest.mark.parametrize("group", ["model", "data", "trainer", "pruning", "evaluation"])
def test_a_group_that_is_no_mapping(group: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    for value in ("5", "[1]", "null", "text"):
        file.write_text(f"{group}: {value}")
        refused(capsys, f"error: .*{group}", "finetune", "--config", file)
        refused(capsys, f"error: .*{group}", "plan", "--config", file)
    file.write_bytes(b"\x80\x81")
    refused(capsys, "x.yaml is not UTF-8", "finetune", f"--{group}", file)
    refused(capsys, "config", "finetune", "--config")


def test_merging_what_does_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and nothing is taken for granted that `adapter_config.json` does not say."""
    options = ("--checkpoint", folder / "adapter", "--output", "never", "--no_check=true")
    weights(lambda tensors: tensors.update({first(tensors): torch.zeros(4, 5)}))(folder)
    refused(capsys, r"does not fit .*model: \S+: \(\d+, 5\) here, \(\d+, \d+\) in the base\n$", "export", *options)
    adapter("r", ...)(folder)
    refused(capsys, "adapter_config.json: no key `r`", "export", *options)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_bad_adapter(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = ADAPTERS[name]
    spoil(folder)
    refused(capsys, message, "generate", "--checkpoint", folder / "adapter")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_training_checkpoint(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = CHECKPOINTS[name]
    spoil(folder)
    refused(capsys, message, "export", "--checkpoint", folder / "x.ckpt", "--output", "never")
    refused(capsys, message, "generate", "--checkpoint", folder / "x.ckpt")


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = MODELS[name]
    spoil(folder)
    refused(capsys, message, "generate", "--checkpoint", folder / "model")


@pytest.mark.parametrize(
    "name", ["no tokenizer", "tokenizer null", "tokenizer a list", "no processor", "template invalid", "image token"]
)
def test_a_plan_with_a_bad_processor(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = MODELS[name]
    spoil(folder)
    refused(capsys, message, "plan", "--model.path", folder / "model")


def test_a_data_folder_with_a_script(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data").mkdir()
    (folder / "data/data.py").write_text("open('executed', 'w')")
    (folder / "data/train.json").write_text("[]")
    message = "error: .*data"
    refused(capsys, message, "evaluate", "--checkpoint", folder / "model", "--data", folder / "data")


def test_resuming_from_a_bad_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ([1], {"state_dict": {}}, torch.zeros(2), {"state_dict": 1, "optimizer_states": 1, "loops": 1}):
        torch.save(content, folder / "y.ckpt")
        refused(capsys, "y.ckpt", "finetune", "--model.path", folder / "model", "--resume", folder / "y.ckpt")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x.txt", "x.txt cannot be read as a training checkpoint"),
        ("nothing", "nothing has no config.json .it holds nothing"),
        ("nobody/nowhere", "nobody/nowhere is neither in the local cache nor reachable"),
        ("no such folder", "there is no folder no such folder"),
        ("", "has no config.json"),
        ("~/nowhere", "there is no folder ~/nowhere"),
        ("a/b/c/d", "there is no folder a/b/c/d"),
        ("file:///etc/passwd", "there is no folder file:///etc/passwd"),
        ("https://host/model", "there is no folder https://host/model"),
        ("unfinished", "unfinished has no adapter: the run did not end"),
        ("/dev/null", "/dev/null"),
        ("x" * 5000, "x"),
    ],
)
def test_no_checkpoint_at_all(path: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text("no checkpoint")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "unfinished/checkpoints").mkdir(parents=True)
    with pytest.raises((ValueError, OSError), match=message):
        load_checkpoint(path)
    refused(capsys, message, "export", f"--checkpoint={path}", "--output", "never")


def test_a_linked_model_loads(folder: Path) -> None:
    """As the hub's cache and `ln -s` of weights make them."""
    blobs, snapshot = folder / "hub/blobs", folder / "hub/snapshots/abc"
    snapshot.mkdir(parents=True)
    shutil.move(folder / "model", blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    load_checkpoint(snapshot)
    shutil.copytree(blobs, folder / "copy")
    (folder / "copy/model.safetensors").unlink()
    (folder / "copy/model.safetensors").symlink_to(blobs / "model.safetensors")
    load_checkpoint(folder / "copy")


def test_pickles_of_the_hub_are_not_run(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "model/pytorch_model.bin")
    load_checkpoint(folder / "model")  # beside safetensors nobody looks at them


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("stages: [{layer: 2, criterion: image, keep_ratio: 1e-1}]")
    found = read_schedule(tmp_path / "x.yaml")
    assert found.stages[0].keep_ratio == 0.1
    (tmp_path / "x.json").write_text(json.dumps(found.to_dict()))
    assert read_schedule(tmp_path / "x.json") == found
    (tmp_path / "x.yaml").write_text("[1e3, 1.5e3, -2E-1, .5, 1_0e1, 1e, e3, 0x1e3, 1e3x, '1e3']")
    assert read_yaml(tmp_path / "x.yaml", list) == [1e3, 1.5e3, -0.2, 0.5, 100.0, "1e", "e3", 0x1E3, "1e3x", "1e3"]


def test_aliases_and_merges_of_some_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {layer: 1}\nb: &b {<<: *a, layer: 2}\nc: [*a, *b, *a]")
    one, two = {"layer": 1}, {"layer": 2}
    assert read_yaml(tmp_path / "x.yaml") == {"a": one, "b": two, "c": [one, two, one]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "no key `a`"),
        ({"a": True}, "`a` is bool True; expected a whole number"),
        ({"a": 1, "b": "x"}, "`b` is str 'x'; expected a number"),
        ({"a": 1, "c": [{"d": 1}, {"d": None}]}, r"`c\[1\].d` is empty; expected a whole number"),
        ({"a": 1, "e": {"x": "y", "z": 1}}, "`e.z` is int 1; expected text"),
        ([], "is list .*; expected a mapping"),
    ],
)
def test_a_shape(value: Any, message: str, tmp_path: Path) -> None:
    shape = {"a": int, "b?": float, "c?": [{"d": int}], "e?": {str: str}}
    file = tmp_path / "x.json"
    file.write_text('{"a": 1, "b": null, "c": [{"d": 2, "more": []}], "e": {"x": "y"}}')
    assert read_json(file, shape)["c"][0]["d"] == 2
    file.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=f"x.json.*{message}"):
        read_json(file, shape)


def test_bounds_leave_nothing_behind() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match=r"this did not end within 0.1 s"), bounded("this", 0.1):
        re.fullmatch(BACKTRACKS, "abc" * 20)
    with pytest.raises(ValueError, match="that takes too much memory"), bounded("that", memory=2**26):
        bytes(2**28)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with bounded("this", 0.05):
        pass
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass


@pytest.mark.parametrize("recipe", ["finetune", "export"])
def test_in_a_process_of_bounded_memory(recipe: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(BOMB)
    header("model/model.safetensors", b"{}", 10**10)(folder)
    options, message = {
        "finetune": (["--config", "x.yaml"], "x.yaml .*more than 100000 values"),
        "export": (["--checkpoint", folder / "model", "--output", "never"], "model.safetensors is damaged"),
    }[recipe]
    check_refused(*in_little_memory(lambda: run(recipe, *options), 4, tmp_path / "log"), message)
