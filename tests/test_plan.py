"""The command line of `plan.py`: the same files and options as `finetune.py`, no weights, clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from planning_toys import planned
from tiny_qwen import save_qwen
from training_toys import run_main
from transformers import LlavaForConditionalGeneration

from himap_train import PruningSchedule
from himap_train.command_line import config_first
from himap_train.data.encode import Encoder
from himap_train.models.loading import load_config, load_processor
from himap_train.models.published import find_config
from himap_train.planning.device_memory import STRATEGIES
from himap_train.planning.plan_cli import PlanCLI, run_settings

CONFIGS = Path(__file__).parents[1] / "configs"
LLAVA_7B = ("--config", str(CONFIGS / "llava_himap.yaml"))
EMBEDDED = ("--config", str(CONFIGS / "coarse.yaml"))


@pytest.fixture(autouse=True)
def no_hub_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a plan must not load weights")

    monkeypatch.setattr("himap_train.models.loading.hf_hub_download", _unreachable)
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", refuse)


def _unreachable(*args: Any, **kwargs: Any) -> None:
    raise ConnectionError("no network in tests")


def test_llava_7b_without_hub_or_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(tmp_path, *LLAVA_7B, "--trainer.devices", "8", "--gpu-memory=80", "--text-tokens", "115")
    parts = plan["facts"]["parts"]
    assert sum(total for name, (total, _) in parts.items() if name != "lora") == 7_063_427_072  # as published
    # LoRA of rank r on a linear layer has r (in + out) parameters.
    widths = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert parts["lora"] == [32 * 128 * widths] * 2
    dense, pruned = plan["sides"]
    assert (dense["image_tokens"], pruned["image_tokens"]) == ([576], [576, 288, 72])
    assert pruned["prefill"]["flops_ratio"] == pytest.approx(0.37, abs=0.005)
    assert set(plan["memory"]) == set(pruned["peak"]) == set(STRATEGIES)
    assert plan["run"]["strategy"] == "DDP"
    assert all(pruned["peak"][name] < dense["peak"][name] for name in STRATEGIES)
    assert all(p >= d for p, d in zip(_largest(pruned), _largest(dense), strict=True))
    out = " ".join(capsys.readouterr().out.split())
    assert "llava-hf/llava-1.5-7b-hf cannot be reached: its published architecture" in out
    assert "8 x 16 x 8 = 1024" in out
    longest = planned(tmp_path, *LLAVA_7B, "--trainer.devices", "8", "--text-tokens", str(2048 - 576))
    assert f"GiB on DDP: dense {longest['sides'][0]['peak']['DDP'] / 2**30:.2f}" in out


def _largest(side: dict[str, Any]) -> list[int]:
    return [rows for by_strategy in side["largest"].values() for rows in by_strategy.values()]


def test_hours_and_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--trainer.devices", "8", "--effective-batch", "128", "--tflops", "250", "--gpu-price", "2.5")
    plan = planned(tmp_path, *LLAVA_7B, *given, "--records", "665000")
    assert plan["run"]["accumulate"] == 2
    for side in plan["sides"]:
        assert side["gpu_hours"] == pytest.approx(665_000 * side["flops"]["total"] / 250e12 / 3600)
    out = " ".join(capsys.readouterr().out.split())
    assert f"{plan['sides'][1]['gpu_hours'] / 8:.3g}" in out.split("hours on 8 GPUs")[1]
    assert f"{plan['sides'][1]['gpu_hours'] * 2.5:,.2f}" in out.split("cost at 2.5 a GPU hour")[1]
    assert planned(tmp_path, *LLAVA_7B, *given, "--trainer.max_steps", "10")["duration"]["samples"] == 1280
    capsys.readouterr()
    planned(tmp_path, *LLAVA_7B, "--data.train", "embedded:train")  # its tokenizer is what cannot be read
    out = " ".join(capsys.readouterr().out.split())
    assert "for hours and cost give --tflops N (reached by one GPU) or --measured" in out
    assert (
        "python recipes/finetune.py --config configs/quickstart.yaml); 115 text tokens assumed" in out
    )  # nothing is cut


def test_hours_from_real_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # this one does load weights
    measured = ("--measured", "--trainer.max_steps", "10", "--data.batch_size", "2", "--effective-batch", "4")
    plan = planned(tmp_path, *EMBEDDED, *measured)
    assert plan["duration"]["samples"] == 40 and plan["duration"]["tflops"] > 0
    assert 0 < plan["sides"][1]["gpu_hours"] < plan["sides"][0]["gpu_hours"]


def test_cached_features_take_the_tower_out_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    measured = ("--measured", "--data.cache_image_features", "true", "--trainer.max_steps", "10")
    plan = planned(tmp_path, *EMBEDDED, *measured)
    assert plan["duration"]["tflops"] > 0 and all(side["flops"]["vision"] == 0 for side in plan["sides"])
    assert all(side["flops"]["vision"] > 0 for side in planned(tmp_path, *EMBEDDED)["sides"])


def test_what_is_cached_behind_the_projector_takes_it_out_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smolvlm = ("--config", str(CONFIGS / "smolvlm_himap.yaml"), "--data.cache_image_features", "true")
    plan = planned(tmp_path, *smolvlm, "--model.projector", "freeze")
    assert all(side["flops"]["vision"] == side["flops"]["projector"] == 0 for side in plan["sides"])
    hours = ("--records", "3600", "--tflops", "1")
    every, cached = (planned(tmp_path, *smolvlm[:2], *hours, *more) for more in ((), smolvlm[2:]))
    pruned, seen_once = every["sides"][1]["flops"], cached["sides"][1]
    assert seen_once["gpu_hours"] == pytest.approx((pruned["total"] - pruned["projector"]) / 1e12)  # an epoch
    rows = planned(tmp_path, *smolvlm[:2])["sides"][1]["largest"]["checkpointing"]["one device"]
    assert plan["sides"][1]["largest"]["checkpointing"]["one device"] > 2 * rows  # the tower's pass is not in the way
    assert plan["sides"][1]["flops"]["decoder"] < 0.4 * plan["sides"][0]["flops"]["decoder"]
    assert run_main("plan", *smolvlm, "--model.projector", "train") == 2
    assert "and the projector is trained; set model.projector to freeze" in capsys.readouterr().err


def test_cached_features_are_in_memory_in_place_of_pixels(tmp_path: Path) -> None:
    """2,340 tokens 4096 wide in bf16 weigh more than five tiles of 336 x 336 pixels in fp32."""
    options = ("--config", str(CONFIGS / "llava_next_himap.yaml"), "--model.projector", "freeze")
    plain, cached = (planned(tmp_path, *options, "--data.cache_image_features", value) for value in ("null", "true"))
    for before, after in zip(plain["sides"], cached["sides"], strict=True):
        saved = [side["activations"]["checkpointing"]["saved"] for side in (before, after)]
        rows = plain["run"]["batch_size"]
        assert saved[1] - saved[0] == rows * (2340 * 4096 * 2 - 4 * 5 * 3 * 336**2)


def test_steps_at_the_end_of_epochs_have_what_is_left(tmp_path: Path) -> None:
    """20 records are three batches of 8: a step of four micro-batches ends with the epoch."""
    given = ("--tflops", "1", "--data.batch_size", "8", "--trainer.accumulate_grad_batches", "4")
    steps = ("--trainer.max_steps", "10", "--trainer.max_epochs", "-1")
    assert planned(tmp_path, *LLAVA_7B, *given, *steps, "--records", "20")["duration"]["samples"] == 200
    assert planned(tmp_path, *LLAVA_7B, *given, *steps, "--records", "64000")["duration"]["samples"] == 320
    steps = ("--trainer.max_steps", "3", "--trainer.max_epochs", "-1")
    assert planned(tmp_path, *LLAVA_7B, *given, *steps, "--records", "40")["duration"]["samples"] == 40 + 32


@pytest.mark.parametrize(("limit", "samples"), [("2", 64), ("0.5", 500)])
def test_limited_batches_limit_the_hours(tmp_path: Path, limit: str, samples: int) -> None:
    given = ("--records", "1000", "--tflops", "1", "--data.batch_size", "32", "--trainer.max_steps", "-1")
    plan = planned(tmp_path, *EMBEDDED, *given, "--trainer.limit_train_batches", limit)
    assert plan["duration"]["samples"] == samples


def test_options_overrule_files_wherever_they_stand() -> None:
    file = str(CONFIGS / "quickstart.yaml")
    config = PlanCLI(["--output", "runs/mine", "--config", file, "--data.batch_size", "3"]).config
    assert (config.output, config.data.batch_size) == ("runs/mine", 3)
    assert config_first(["--a", "1", "--config=b", "--config", "c", "-d"]) == [
        "--config=b",
        "--config",
        "c",
        "--a",
        "1",
        "-d",
    ]


def test_overlay_plans_the_13b_model(tmp_path: Path) -> None:
    plan = planned(tmp_path, *LLAVA_7B, "--config", str(CONFIGS / "llava_13b_himap.yaml"))
    total = sum(total for name, (total, _) in plan["facts"]["parts"].items() if name != "lora")
    assert total == pytest.approx(13.35e9, rel=0.005)
    assert (plan["run"]["batch_size"], plan["run"]["accumulate"]) == (4, 32)
    assert plan["sides"][1]["schedule"] == PruningSchedule.from_preset("himap").to_dict()


def test_data_of_the_config_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(tmp_path, *EMBEDDED)
    sample = plan["sample"]
    assert (sample["images"], sample["image_tokens"]) == (1, 144)
    assert 1 <= sample["supervised"] <= sample["text_tokens"] <= sample["longest_text"] <= 256 - 144
    assert "conversations of the training data" in " ".join(capsys.readouterr().out.split())
    assert plan["sides"][1]["image_tokens"] == [144, 86, 22]


def test_text_only_data(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What is two plus two?"}, {"from": "gpt", "value": "Four."}]
    data = tmp_path / "text.json"
    data.write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(4)]))
    plan = planned(tmp_path, *EMBEDDED, "--data.train", str(data))
    dense, pruned = plan["sides"]
    assert plan["sample"]["images"] == 0
    assert pruned["image_tokens"] == [0, 0, 0]
    assert pruned["flops"]["forward"] == pytest.approx(dense["flops"]["forward"], rel=0.01)  # ranking alone
    assert pruned["flops"]["vision"] == dense["flops"]["vision"] > 0  # one blank image a batch


@pytest.mark.parametrize(
    ("schedule", "tokens"),
    [
        ("null", [[144]]),
        ("none", [[144]]),
        ("himap", [[144], [144, 72, 18]]),
        ("random", [[144], [144, 72, 18]]),
        ('{"stages": [{"layer": 3, "criterion": "last_token", "keep_count": 20}]}', [[144], [144, 20]]),
    ],
)
def test_schedules(tmp_path: Path, schedule: str, tokens: list[list[int]]) -> None:
    options = ("--model.path", "embedded", "--model.schedule", schedule, "--text_tokens", "40")
    plan = planned(tmp_path, *options)
    assert [side["image_tokens"] for side in plan["sides"]] == tokens
    assert all(stage["layer"] < 8 for side in plan["sides"] for stage in side["schedule"]["stages"])


def test_other_schedules_during_training_are_noted(tmp_path: Path) -> None:
    plan = planned(tmp_path, "--model.path", "embedded", "--text_tokens", "40", "--pruning.curriculum.share", "0.5")
    assert any("pruning.curriculum: some steps run up to dense" in note for note in plan["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.strategy", "deepspeed_stage2"], "did you mean 'deepspeed_stage_2'? valid: auto"),
        (
            ["--effective_batch", "100", "--trainer.devices", "8"],
            "is no multiple of data.batch_size 8 x 8 devices = 64",
        ),
        (["--effective_batch", "96", "--trainer.devices", "8"], "valid data.batch_size: 1, 2, 3, 4, 6, 12"),
        (["--trainer.devices", "0"], "trainer.devices is '0'; expected a number"),
        (["--model.attn_implementation", "paged"], "valid: sdpa, eager, flash_attention_2"),
        (["--model.lora_targets", '["qproj"]'], "match nothing; the decoder has the linear layers down_proj"),
        (["--model.path", "nobody/nothing"], "llava-hf/llava-1.5-13b-hf"),
        (["--gpu-memory", "0"], "expected the GiB of one GPU"),
        (["--text-tokens", "-1"], "--text_tokens is -1; expected 0 or more"),
        (
            ["--model.schedule", '{"stages": [{"layer": 32, "criterion": "image", "keep_ratio": 0.5}]}'],
            "the decoder has layers 0 to 31",
        ),
    ],
)
def test_errors_name_the_key_and_what_is_valid(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main("plan", *LLAVA_7B, *options) == 2
    assert message in capsys.readouterr().err


def test_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_main("plan", *LLAVA_7B, "--data.batchsize", "4")
    assert "Did you mean 'data.batch_size'?" in capsys.readouterr().err


def test_run_as_configured() -> None:
    options = ["--trainer.devices", "4", "--trainer.num_nodes", "2", "--trainer.precision", "16-mixed"]
    strategy = ["--trainer.strategy", "deepspeed_stage_3_offload", "--effective_batch", "128"]
    run = run_settings(PlanCLI([*LLAVA_7B, *options, *strategy, "--model.attn_implementation", "eager"]).config)
    assert (run.devices, run.accumulate, run.effective_batch) == (8, 2, 128)
    assert (run.strategy, run.precision, run.attention) == ("ZeRO-3 offload", "16-mixed", "eager")


@pytest.mark.parametrize(
    ("strategy", "found"),
    [
        ({"class_path": "lightning.pytorch.strategies.DDPStrategy"}, "DDP"),
        (
            {
                "class_path": "himap_train.training.zero.strategy.ZeroStrategy",
                "init_args": {"stage": 3, "offload": True},
            },
            "ZeRO-3 offload",
        ),
    ],
)
def test_strategy_given_as_a_class(strategy: dict[str, Any], found: str) -> None:
    options = ["--trainer.devices", "2", "--trainer.strategy", json.dumps(strategy)]
    assert run_settings(PlanCLI([*LLAVA_7B, *options]).config).strategy == found


def test_eager_attention_and_quantised_weights_change_the_memory(tmp_path: Path) -> None:
    usual = planned(tmp_path, *LLAVA_7B)
    eager = planned(tmp_path, *LLAVA_7B, "--model.attn_implementation", "eager")
    nf4 = planned(tmp_path, *LLAVA_7B, "--model.quantize", "4bit")
    state = "no checkpointing"
    length, heads, layers = 576 + 115, 32, 32
    more = [plan["sides"][0]["activations"][state]["saved"] for plan in (eager, usual)]
    probabilities = 8 * layers * heads * length**2 * (4 + 2)  # fp32 and bf16
    of_flash_alone = 8 * layers * length * (2 * 4096 + 4 * heads)  # its output and log-sum-exp
    assert more[0] - more[1] == pytest.approx(probabilities - of_flash_alone, rel=0.001)
    frozen = [plan["memory"]["one device"]["frozen"] for plan in (usual, nf4)]
    assert frozen[0] - frozen[1] == pytest.approx(6.476e9 * (2 - 4.127 / 8), rel=0.001)


def test_every_shipped_config_can_be_planned(tmp_path: Path) -> None:
    files = sorted(
        file for file in CONFIGS.rglob("*.yaml") if file.name != "pretrained.yaml"
    )  # its recipe makes its model
    assert len(files) >= 7
    for file in files:
        first = LLAVA_7B if "llava" in file.name or file.parent != CONFIGS else EMBEDDED
        planned(tmp_path, *first, "--config", str(file), "--text_tokens", "60")


def test_built_in_architectures_are_read_where_the_hub_is_not_reached() -> None:
    config, found = find_config("llava-hf/llava-1.5-13b-hf")
    assert "cannot be reached" in found
    text: Any = config.text_config
    assert (text.num_hidden_layers, text.hidden_size, text.vocab_size) == (40, 5120, 32064)


@pytest.mark.slow
def test_verify_prints_errors_of_both_models(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.undo()  # here weights are loaded
    assert run_main("plan", "--verify") == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row[1].strip() for row in rows} == {"embedded", "100M"}
    assert all(abs(float(row[6].strip(" %"))) < 10 for row in rows)


def test_longest_rows_are_cut_as_in_training(tmp_path: Path) -> None:
    assert planned(tmp_path, *EMBEDDED, "--data.max_length", "160")["sample"]["longest_text"] == 160 - 144


def test_the_longest_row_may_be_the_one_with_many_images(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    answer = {"from": "gpt", "value": "yes"}
    for most in (1, 3):
        asked = [[{"from": "human", "value": "<image>" * number + "what is it?"}, answer] for number in (1, 1, most)]
        records = [{"image": ["a.png"] * turns[0]["value"].count("<image>"), "conversations": turns} for turns in asked]
        (tmp_path / "records.json").write_text(json.dumps(records))
        options = ["--data.train", str(tmp_path / "records.json"), "--data.max_length", "1000"]
        sample = planned(tmp_path, *EMBEDDED, *options)["sample"]
        assert sample["images"] == 1
        assert sample["longest_text"] - sample["text_tokens"] == pytest.approx((most - 1) * 144, abs=2)


def records(folder: Path, *images: int, words: int = 0) -> str:
    """A file of conversations with so many images each; those without have so many words more."""
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    asked = [
        {
            "image": ["a.png"] * number,
            "conversations": [
                {"from": "human", "value": "<image>" * number + "what is it?" + " red" * (0 if number else words)},
                {"from": "gpt", "value": "yes"},
            ],
        }
        for number in images
    ]
    file = folder / f"{'-'.join(map(str, images))}-{words}.json"
    file.write_text(json.dumps(asked))
    return str(file)


def test_flops_are_the_mean_of_all_conversations(tmp_path: Path) -> None:
    """Those without images count, and those with several: held to plans of each of them alone."""

    def flops(data: str) -> list[float]:
        found = planned(tmp_path, *EMBEDDED, "--data.train", data)
        return [side["flops"]["forward"] + side["flops"]["backward"] for side in found["sides"]]

    alone = [flops(records(tmp_path, number)) for number in (0, 1, 3)]
    mixed = flops(records(tmp_path, 0, 0, 1, 3))
    assert mixed == pytest.approx([(2 * a + b + c) / 4 for a, b, c in zip(*alone, strict=True)])
    paths = records(tmp_path, *[1] * 40), records(tmp_path, 3, 3)
    weighted = json.dumps([{"path": path, "weight": weight} for path, weight in zip(paths, (1, 3), strict=True)])
    kinds = planned(tmp_path, *EMBEDDED, "--data.train", weighted)["sample"]["kinds"]
    assert [kind["images"] for kind in kinds] == [1, 3]
    assert [kind["share"] for kind in kinds] == pytest.approx([0.25, 0.75], abs=0.03)


def test_nothing_leaves_a_long_conversation_without_images(tmp_path: Path) -> None:
    def peaks(words: int) -> list[int]:
        found = planned(tmp_path, *EMBEDDED, "--data.train", records(tmp_path, 1, 1, 0, words=words))
        return [side["activations"]["no checkpointing"]["peak"] for side in found["sides"]]

    (dense, pruned), (_, long) = peaks(2), peaks(100)
    assert pruned < long < dense


def test_images_have_the_tokens_that_the_processor_gives_them(tmp_path: Path) -> None:
    """In a family whose tokens follow a picture's pixels, by what the folder's processor allows."""
    save_qwen(tmp_path / "model", "qwen2_vl", layers=4)
    data = ["--data.train", records(tmp_path, 1), "--data.max_length", "null"]
    found = planned(tmp_path, *EMBEDDED, "--model.path", str(tmp_path / "model"), "--model.schedule", "null", *data)
    processor = load_processor(tmp_path / "model", load_config(tmp_path / "model"))
    assert found["sample"]["image_tokens"] == Encoder(processor).image_tokens((64, 64))[0]


def test_images_that_enter_later_cost_less(tmp_path: Path) -> None:
    found = planned(tmp_path, *EMBEDDED, "--model.schedule", "{enter: 4}")
    dense, pruned = [side["flops"]["forward"] for side in found["sides"]]
    assert pruned < 0.8 * dense
