"""The plan of a run: parameters, tokens, FLOPs and memory, dense beside pruned."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from himap_train.models.families import family_of_config
from himap_train.models.training_cost import TrainingFlops, backward_of_attention, training_flops
from himap_train.planning.activations import ActivationModel
from himap_train.planning.device_memory import GIB, STRATEGIES, StaticMemory, largest_batch, static_memory
from himap_train.planning.facts import Activations, Batch, ModelFacts, Numerics
from himap_train.pruning.cost import Cost, image_tokens_per_layer
from himap_train.pruning.schedule import PruningSchedule


@dataclass(frozen=True)
class Kind:
    """Means of the conversations with one number of images, and their share of all."""

    share: float
    images: int
    image_tokens: int
    text_tokens: int
    supervised: int


@dataclass(frozen=True)
class Sample:
    """Tokens of a conversation with images, where there are such: the mean decides FLOPs, the longest decides memory.

    Attributes:
        images: Images of a conversation.
        image_tokens: Image tokens of one image.
        text_tokens: Mean of all other tokens.
        longest_text: Most of them, with the tokens of images beyond `images`.
        supervised: Mean of the positions with something to predict.
        most_supervised: Most of them.
        kinds: All conversations, whose mean FLOPs are; where nothing was read, the one above is all there is.
        longest_alone: Tokens of the longest conversation without an image.
    """

    images: int
    image_tokens: int
    text_tokens: int
    longest_text: int
    supervised: int
    most_supervised: int
    kinds: tuple[Kind, ...] = ()
    longest_alone: int = 0

    @property
    def kind(self) -> Kind:
        """This one, as if all were alike."""
        return Kind(1.0, self.images, self.images * self.image_tokens, self.text_tokens, self.supervised)


@dataclass(frozen=True)
class RunSettings:
    """What the config says about the run.

    Attributes:
        precision: Precision of the trainer.
        strategy: One of `STRATEGIES`.
        devices: All of the run.
        batch_size: Conversations in a micro-batch of one device.
        accumulate: Micro-batches in an optimizer step.
        checkpointing: Whether decoder layers run again in the backward pass.
        attention: "sdpa", "flash_attention_2" or "eager".
        loss_chunk: Positions whose logits exist at a time.
        four_bit: Whether the frozen weights are quantised.
        gpu_memory: GiB of one GPU.
        cached: Whether image features are, so that the vision tower runs once an image, before training.
    """

    precision: str
    strategy: str
    devices: int
    batch_size: int
    accumulate: int
    checkpointing: bool
    attention: str
    loss_chunk: int
    four_bit: bool
    gpu_memory: float
    cached: bool = False

    @property
    def effective_batch(self) -> int:
        """Conversations in an optimizer step of all devices."""
        return self.batch_size * self.accumulate * self.devices


@dataclass(frozen=True)
class Side:
    """One schedule's part of the plan.

    Attributes:
        name: "dense" or "pruned".
        schedule: The schedule, scaled to the decoder.
        image_tokens: Image tokens of a sample at first and after each stage.
        prefill: Cost of a forward pass without LoRA, as everywhere in this project.
        flops: FLOPs of one sample in a training step.
        activations: By whether there is checkpointing; at the longest sample.
        largest: Largest batch of one device that fits, by checkpointing and strategy.
    """

    name: str
    schedule: PruningSchedule
    image_tokens: tuple[int, ...]
    prefill: Cost
    flops: TrainingFlops
    activations: dict[bool, Activations]
    largest: dict[bool, dict[str, int]]


@dataclass(frozen=True)
class Duration:
    """How long training takes, without validations and saving.

    Attributes:
        samples: That are trained on, each time anew.
        tflops: TFLOP/s that one GPU reaches.
        price: Of a GPU for an hour; None where it is not known.
        before: FLOPs before the first step, of image features that are cached.
    """

    samples: int
    tflops: float
    price: float | None = None
    before: float = 0.0

    def flops(self, side: Side) -> float:
        """Of the whole run."""
        return self.before + self.samples * side.flops.total

    def gpu_hours(self, side: Side) -> float:
        """Hours of one GPU, of all GPUs together."""
        return self.flops(side) / (self.tflops * 1e12) / 3600


@dataclass(frozen=True)
class Plan:
    """Everything that is printed.

    Attributes:
        facts: Facts of the model.
        run: Settings of the config.
        sample: Tokens.
        memory: By strategy.
        sides: Dense, and pruned where the schedule has stages.
        notes: Where numbers come from and what is assumed.
        duration: None where throughput or number of samples are not known.
    """

    facts: ModelFacts
    run: RunSettings
    sample: Sample
    memory: dict[str, StaticMemory]
    sides: tuple[Side, ...]
    notes: tuple[str, ...]
    duration: Duration | None = None

    def peak(self, strategy: str, side: Side) -> int:
        """Bytes of one GPU at the worst moment, with checkpointing as configured."""
        return self.memory[strategy].peak(side.activations[self.run.checkpointing])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; bytes and FLOPs."""
        fields = asdict(replace(self, facts=replace(self.facts, config=None)))
        del fields["facts"]["config"]
        for written, side in zip(fields["sides"], self.sides, strict=True):
            written["schedule"] = side.schedule.to_dict()
            written["flops"] |= {"decoder": side.flops.decoder, "total": side.flops.total}
            for key in ("activations", "largest"):
                both = written[key]
                written[key] = {"checkpointing": both[True], "no checkpointing": both[False]}
            written["peak"] = {name: self.peak(name, side) for name in STRATEGIES}
            written["gpu_hours"] = self.duration.gpu_hours(side) if self.duration else None
        return fields


def make_plan(
    facts: ModelFacts, run: RunSettings, schedule: PruningSchedule, sample: Sample, notes: tuple[str, ...] = ()
) -> Plan:
    """Predict a run under a schedule that is scaled to the decoder; notes are to be printed."""
    numerics = Numerics.of(run.precision)
    memory = {name: static_memory(name, facts, numerics, run.devices, run.four_bit) for name in STRATEGIES}
    schedules = {"dense": PruningSchedule()} | ({} if schedule.dense else {"pruned": schedule})
    sides = tuple(_side(name, facts, run, one, sample, memory) for name, one in schedules.items())
    return Plan(facts, run, sample, memory, sides, notes)


def _side(
    name: str,
    facts: ModelFacts,
    run: RunSettings,
    schedule: PruningSchedule,
    sample: Sample,
    memory: dict[str, StaticMemory],
) -> Side:
    image_tokens = sample.images * sample.image_tokens
    longest = Batch(run.batch_size, image_tokens, sample.longest_text, sample.most_supervised, sample.images)
    rows = [longest]
    if sample.longest_alone:  # from which nothing leaves
        answers = min(sample.most_supervised, sample.longest_alone)
        rows.append(Batch(run.batch_size, 0, sample.longest_alone, answers, 0))
    per_layer = image_tokens_per_layer(schedule, facts.layers, image_tokens)
    activations, largest = {}, {}
    for checkpointing in (True, False):
        numerics = Numerics.of(run.precision)
        predict = ActivationModel(facts, numerics, run.attention, checkpointing, run.loss_chunk, run.cached)
        activations[checkpointing] = max((predict(schedule, row) for row in rows), key=lambda found: found.peak)
        room = int(run.gpu_memory * GIB)
        largest[checkpointing] = {
            strategy: min(largest_batch(static, predict, schedule, row, room) for row in rows)
            for strategy, static in memory.items()
        }
    flops = _mean_flops(facts, run, schedule, sample)
    prefill = schedule.cost(facts.config, image_tokens=image_tokens, text_tokens=sample.text_tokens)
    after = (image_tokens, *(per_layer[stage.layer] for stage in schedule.stages))
    return Side(name, schedule, after, prefill, flops, activations, largest)


def _mean_flops(facts: ModelFacts, run: RunSettings, schedule: PruningSchedule, sample: Sample) -> TrainingFlops:
    """Of all conversations: those without images count, and those with several."""
    kinds = sample.kinds or (sample.kind,)
    total: dict[str, float] = {}
    for kind in kinds:
        found = training_flops(
            schedule, facts.config, kind.image_tokens, kind.text_tokens,
            lora_parameters=[lora.parameters for lora in facts.lora],
            supervised=kind.supervised,
            images=kind.images or (1 / run.batch_size if len(kinds) == 1 else 0),  # a batch of text runs a blank one
            trains_projector=facts.trains_projector,
            ends_adapted=facts.ends_adapted,
            checkpointing=run.checkpointing,
            lm_head_passes=3 if 0 < run.loss_chunk < kind.supervised * run.batch_size else 2,
            attention_backward=backward_of_attention(run.attention),
        )  # fmt: skip
        for name, value in asdict(found).items():
            total[name] = total.get(name, 0.0) + kind.share * value
    if run.cached:
        total["vision"] = 0.0
        total["projector"] *= family_of_config(facts.config).projects_cached
    return TrainingFlops(**total)
