"""The methods that pruning puts on a model: its forward, that of the inner model, and `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from himap_train.models.families.tower_reading import with_readings
from himap_train.models.guard import check_ran
from himap_train.models.inputs import check_media
from himap_train.models.installed import InstalledPruning
from himap_train.models.prompt import (
    LABELS,
    forward_of_whole,
    generation,
    grids_of_prompt,
    images_of_prompt,
    labels_of_text,
    running_whole,
    supervised_by,
)
from himap_train.models.stock import text_decoder
from himap_train.models.versions import given_cache


class OwnMethod:
    """A method of ours in the place of an instance's own, with the signature of the stock one: `generate` looks at it.

    Attributes:
        ours: What runs instead: it is given this object, then the call's arguments.
        module: Whose method it is.
        name: Of the method.
        whole: The whole model.
        found: What stood on the instance before; None where that was the class's own.
    """

    def __init__(self, ours: Callable[..., Any], module: Any, name: str, whole: Any) -> None:
        self.ours, self.module, self.name, self.whole = ours, module, name, whole
        self.found = module.__dict__.get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ours while pruning is installed; what was there before where somebody still holds this after its removal."""
        return self.ours(self, *args, **kwargs) if self.pruning is not None else self.before(*args, **kwargs)

    def before(self, *args: Any, **kwargs: Any) -> Any:
        """The method as it was before."""
        if self.found is not None:
            return self.found(*args, **kwargs)
        return self.stock(self.module, *args, **kwargs)

    def take_off(self) -> None:
        """Put back what was there before."""
        if self.found is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self.found)

    @property
    def stock(self) -> Callable[..., Any]:
        """The class's own method."""
        return cast(Callable[..., Any], getattr(type(self.module), self.name))

    @property
    def pruning(self) -> InstalledPruning | None:
        """What is installed."""
        return getattr(text_decoder(self.whole), "himap_pruning", None)

    @property
    def __signature__(self) -> inspect.Signature:
        stock = _signature(self.stock)
        return stock.replace(parameters=list(stock.parameters.values())[1:])

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a call was given, by name."""
        bound = _signature(self.stock).bind_partial(self.module, *args, **kwargs).arguments
        bound.pop("self", None)
        return bound | bound.pop("kwargs", {}) | bound.pop("model_kwargs", {})


_signature = cache(inspect.signature)


def whole_forward(method: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """The forward of the whole model: what its labels supervise is told to the decoder, images are not predicted."""
    given, pruning = method.given(args, kwargs), method.pruning
    _require_own_gpu(method.module, given)
    with forward_of_whole(supervised_by(given)):
        if pruning is None or pruning.schedule.dense or all(given.get(name) is None for name in LABELS):
            return method.before(*args, **kwargs)
        said = given.get("image_token_mask")
        image = _image_tokens(method.module.model, given) if said is None else said
        return method.before(**given | ({} if image is None else labels_of_text(given, image.bool())))


def _require_own_gpu(model: Any, given: dict[str, Any]) -> None:
    """RuntimeError in a replica of `nn.DataParallel`, whose methods are those of the model it was copied from."""
    tokens = given.get("input_ids")
    if tokens is None or tokens.device.type != "cuda" or getattr(model, "hf_device_map", None):
        return
    if model.device.type == "cuda" and tokens.device != model.device:
        raise RuntimeError(
            f"tokens are on {tokens.device} and the pruned model on {model.device}. Where nn.DataParallel spread a "
            "batch (Hugging Face's Trainer does, started by plain python with several GPUs): start with torchrun or "
            "accelerate launch, or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )


def inner_forward(method: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """The inner model's forward, which passes keyword arguments that it does not know on to the decoder."""
    inner, given, pruning = method.module, method.given(args, kwargs), method.pruning
    assert pruning is not None
    if pruning.schedule.dense:
        return method.before(*args, **kwargs)
    check_media(pruning.family, inner.config, given)
    if given.get("image_token_mask") is None:
        kwargs["image_token_mask"] = _image_tokens(inner, given)
    if pruning.schedule.uses_places:
        kwargs["image_grids"] = grids_of_prompt() or pruning.family.image_grids(inner.config, given)
    if given.get("supervised_mask") is None and running_whole() is None:
        _check_whole_forward(method.whole)
    before, kv = pruning.last, given_cache(given)
    images = given.get("pixel_values") is not None or bool(given.get("mm_encoder_outputs"))
    prefill = images and (kv is None or not kv.get_seq_length())
    if prefill and pruning.schedule.uses_tower:
        args, kwargs = (), given | kwargs | _encoded(inner, given)
    output = method.before(*args, **kwargs)
    if prefill:
        check_ran(pruning, before)
    return output


def image_features(method: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """The inner model's `get_image_features`, with what the tower looks at where the schedule asks for it."""
    pruning = method.pruning
    assert pruning is not None
    if not pruning.schedule.uses_tower:
        return method.before(*args, **kwargs)
    given = method.given(args, kwargs) | {"return_dict": True}
    return with_readings(pruning.family, method.whole, given, partial(method.before, **given))


def _encoded(inner: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Images encoded before the inner forward, which would keep the tower's readings from the decoder."""
    encoded = dict(given.get("mm_encoder_outputs") or {})
    if encoded.get("image") is None:
        names = inspect.signature(inner.get_image_features).parameters
        encoded["image"] = inner.get_image_features(**{name: given[name] for name in names if name in given})
    readings = getattr(encoded["image"], "tower_readings", None)
    return {"pixel_values": None, "mm_encoder_outputs": encoded, "tower_readings": readings}


def _check_whole_forward(whole: Any) -> None:
    """Raise ValueError where the whole model's forward was replaced by one that keeps the labels for itself."""
    if not isinstance(whole.__dict__.get("forward"), OwnMethod):
        raise ValueError(
            "the model's forward was replaced after install_pruning, by one that calls the inner model without saying "
            "what is prompt and what is answer: call install_pruning(model, schedule) again, behind what replaced it "
            "(a trainer's constructor), or pass supervised_mask"
        )


def generate(method: OwnMethod, *args: Any, **kwargs: Any) -> Any:
    """`generate`, which tells the decoder how long the prompt is, and where its images are and of what shape.

    transformers encodes the images before the first forward, which then is not given their sizes, and knows no
    `image_token_mask`, which prompts need whose images are merged into `inputs_embeds` already.
    """
    images = kwargs.pop("image_token_mask", None)
    given, pruning = method.given(args, kwargs), method.pruning
    grids = None
    if pruning is not None and pruning.schedule.uses_places:
        grids = pruning.family.image_grids(method.module.config, given)
    prompts = (given.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    prompt = next((values for values in prompts if values is not None), None)
    ids = given.get("input_ids")
    if images is None and ids is not None and given.get("inputs_embeds") is not None:
        images = ids == method.module.config.image_token_id
    if images is not None and (prompt is None or images.shape != prompt.shape[:2]):
        found = None if prompt is None else tuple(prompt.shape[:2])
        raise ValueError(f"image_token_mask has shape {tuple(images.shape)}, the prompts {found}: one entry per token")
    with generation(None if prompt is None else prompt.shape[1], grids, None if images is None else images.bool()):
        return method.before(*args, **kwargs)


def _image_tokens(inner: Any, given: dict[str, Any]) -> Tensor | None:
    """Where the images are, (B, S) bool; None where the caller merged them into the embeddings and does not say."""
    image_id = inner.config.image_token_id
    if given.get("input_ids") is not None:
        return cast(Tensor, given["input_ids"] == image_id)
    embeds = given.get("inputs_embeds")
    if embeds is None:
        return None
    if given.get("pixel_values") is None and not given.get("mm_encoder_outputs"):
        return images_of_prompt(embeds)
    placeholder = inner.get_input_embeddings()(torch.tensor(image_id, device=embeds.device))
    return cast(Tensor, (embeds == placeholder).all(-1))
