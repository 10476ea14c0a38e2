"""What this project must know of a model family: a stock Hugging Face vision-language model, its processor, its sizes.

One family is one file, a subclass of `Family`; all else asks the family and names no model class. The base class is
what families of LLaVA's build have in common: a tower, a projector, a text decoder with one position number a token.
Shapes: B rows, S columns, D decoder width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from himap_train.models.families.blocks import TokenBlock
from himap_train.models.families.positions import LayerInputs, Positions
from himap_train.models.families.sizes import VisionSizes
from himap_train.models.versions import feature_layers
from himap_train.pruning.places import TokenGrid

AspectRatio = Literal["as_processor", "pad"]
"""What happens to an image that is not square: as the processor's own settings say, or padded to a square first."""
Background = Literal["white", "black"]
"""What lies under transparent pixels."""
Images = Mapping[str, Tensor]
"""Images as a model's forward takes them, by its keyword: `pixel_values`, `image_sizes`, `image_grid_thw`, ...; of no
images empty. Of one image every tensor's first dimension is what is put one behind the other in a batch.
"""


class Family(ABC):
    """One model family.

    Attributes:
        name: As the docs call it.
        model_types: `model_type` of the configs that it opens.
        decoder_types: `model_type` of the text configs that run in the layer loop.
        decoder_name: Path of the text decoder below the model.
        vision_name: Path of the vision tower below the model.
        projector_names: Paths of what stands between tower and decoder, and is trained and saved as the projector.
        weight_renames: How names in published files, and in adapters of earlier releases of transformers, become those
            of the module tree: (pattern, replacement); the first that is found decides.
        processor_class: What `load_processor` gives.
        renumbers: Whether positions can be counted anew after a removal: not where they are 3-D.
        towers: `model_type` of the vision configs that `read_tower` reads.
        caches_features: Whether features of an image can be kept on disk: not where its neighbours change them.
        projects_cached: Whether those are what the projector takes, which may be trained then; else what it gives.
        takes_padding: Whether `image_aspect_ratio: pad` means anything to its processor.
        resizes_images: Whether images may be made smaller, for fewer image tokens.
        counts_images: Whether an image is cut otherwise where its conversation has several.
        casts_features: Whether the stock forward gives image features the tower's dtype, not that of the embeddings.
        marks_tiles: Whether text that asks for nothing stands between the tiles of an image.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    decoder_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")
    decoder_name: ClassVar[str] = "model.language_model"
    vision_name: ClassVar[str] = "model.vision_tower"
    projector_names: ClassVar[tuple[str, ...]] = ("model.multi_modal_projector",)
    weight_renames: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        (r"^(language_model|multi_modal_projector)\.", r"model.\1."),
        (r"^image_newline$", "model.image_newline"),
    )
    processor_class: ClassVar[type[Any]]
    renumbers: ClassVar[bool] = True
    towers: ClassVar[tuple[str, ...]] = ()
    caches_features: ClassVar[bool] = True
    projects_cached: ClassVar[bool] = False
    takes_padding: ClassVar[bool] = False
    resizes_images: ClassVar[bool] = False
    counts_images: ClassVar[bool] = False
    casts_features: ClassVar[bool] = False
    marks_tiles: ClassVar[bool] = False

    # The model.

    def decoder(self, model: nn.Module) -> Any:
        """The text decoder."""
        return model.get_submodule(self.decoder_name)

    def vision(self, model: nn.Module) -> Any:
        """The vision tower."""
        return model.get_submodule(self.vision_name)

    def image_token_id(self, config: Any) -> int:
        """The token in whose places image features stand."""
        return int(config.image_token_id)

    def encode_images(self, model: Any, images: Images) -> Any:
        """Image features as `mm_encoder_outputs["image"]` of the stock forward takes them."""
        return model.get_image_features(**images, return_dict=True)

    def read_tower(self, model: Any, images: Images, states: Any) -> Tensor:
        """What the tower looks at, of each image token of these images, from its states: (N, 1 + W) fp32, see
        `TowerReadings` and `tower_reading`.
        """
        raise TypeError(f"family {self.name} does not tell what its vision tower looks at")

    def tower_features(self, model: Any, images: Images, readings: bool = False) -> Tensor:
        """What the projector takes, (images, T, W), where that is cached; `readings` packs `read_tower` beside."""
        raise TypeError(f"family {self.name} keeps no features of the tower alone")

    def project(self, model: Any, features: Tensor) -> Tensor:
        """Image features (..., D) from those of the tower (..., W), where it `projects_cached`."""
        raise TypeError(f"family {self.name} keeps no features of the tower alone")

    def joins_images(self, config: Any) -> bool:
        """Whether the stock forward takes features of all images as one tensor, not as a list."""
        return False

    def empty_images(self, model: Any) -> dict[str, Tensor]:
        """The smallest image there is: what a batch of text runs where other processes run images."""
        vision: Any = model.config.vision_config
        size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        blank = torch.zeros(1, vision.num_channels, size, size, device=model.device)
        return {"pixel_values": blank.to(self.vision(model).dtype)}

    def forward_inputs(self, config: Any, input_ids: Tensor, images: Images) -> dict[str, Tensor]:
        """What `forward` and `generate` take beside token ids (B, S) and images."""
        return {}

    def position_inputs(self, images: Images) -> dict[str, Tensor]:
        """Those of the images that the forward needs although the features are given: sizes and grids."""
        return {name: values for name, values in images.items() if not name.startswith("pixel_values")}

    # The layer loop.

    def positions(self, position_ids: Tensor | None, embeds: Tensor, cached: int) -> Positions:
        """As the stock decoder reads them, of embeddings (B, S, D) behind `cached` tokens."""
        if position_ids is None:
            position_ids = torch.arange(embeds.shape[1], device=embeds.device).unsqueeze(0) + cached
        return Positions(position_ids, position_ids)

    def layer_inputs(self, options: dict[str, Any]) -> LayerInputs | None:
        """Takes what is added between layers out of the decoder's further `options`; None where nothing is."""
        return None

    def image_grids(self, config: Any, given: Mapping[str, Any]) -> list[TokenGrid] | None:
        """Those of a batch's images, from what the inner forward is given; one if all are alike, None if unknown."""
        return None

    # Data.

    @abstractmethod
    def load_processor(self, folder: str, config: Any) -> Any:
        """The checkpoint's processor: `tokenizer`, `image_processor`, `chat_template`, `image_token`, `image_token_id`,
        `apply_chat_template(messages, add_generation_prompt=...)` -> text, and `save_pretrained(folder)`.

        Raises:
            ValueError: The folder has none.
        """

    @abstractmethod
    def encode_image(self, processor: Any, image: Image.Image, aspect_ratio: AspectRatio) -> dict[str, Tensor]:
        """One image (RGB) as the model takes it."""

    def encode_conversation(
        self, processor: Any, images: Iterable[Image.Image], aspect_ratio: AspectRatio
    ) -> list[dict[str, Tensor]]:
        """All images (RGB) of one conversation, each as the model takes it."""
        return [self.encode_image(processor, image, aspect_ratio) for image in images]

    @abstractmethod
    def image_tokens(self, processor: Any, image: Images) -> int:
        """Image tokens of one encoded image."""

    @abstractmethod
    def tokens_of_size(self, processor: Any, size: tuple[int, int], aspect_ratio: AspectRatio) -> int:
        """Image tokens of an image of this (width, height), without decoding one."""

    def tokens_of_sizes(self, processor: Any, sizes: Sequence[tuple[int, int]], aspect_ratio: AspectRatio) -> list[int]:
        """Image tokens of each image of one conversation by its (width, height), without decoding one."""
        return [self.tokens_of_size(processor, size, aspect_ratio) for size in sizes]

    def limit_image_tokens(self, processor: Any, most: int) -> None:
        """Let a processor make no image larger than so many image tokens; ValueError where none is so small."""
        raise TypeError(f"family {self.name} makes no image smaller")

    def placeholder(self, processor: Any, tokens: int, size: tuple[int, int]) -> list[int]:
        """Token ids in the place of the one that the chat template writes for an image of so many image tokens and this
        (width, height) in pixels.
        """
        return [processor.image_token_id] * tokens

    # Pictures of what is kept.

    def token_blocks(self, processor: Any, image: Images, picture: Image.Image) -> list[TokenBlock]:
        """Where the tokens of an encoded image lie over the picture of `drawn_over`, in their order.

        Raises:
            ValueError: The family does not tell, or the tokens form no grid.
        """
        raise ValueError(f"where the image tokens of family {self.name} lie is not known: nothing can be drawn")

    def drawn_over(self, processor: Any, image: Images, picture: Image.Image) -> Image.Image:
        """What the blocks lie over: the picture, or what the model sees of it."""
        return picture

    # Sizes.

    @abstractmethod
    def tokens_of_config(self, config: Any) -> int:
        """Image tokens of a typical image, from the model's config alone: what plans and budgets are made for."""

    def typical_images(self, config: Any, count: int) -> dict[str, Tensor]:
        """Noise in the shape of so many typical images, as the model takes them: for measurements."""
        raise ValueError(f"family {self.name} makes no images of noise; take a model of llava, qwen2_vl or qwen3_vl")

    @abstractmethod
    def vision_flops(self, config: Any, image_tokens: int) -> float:
        """FLOPs (two per multiply-add) of the vision tower over an image that gives so many image tokens, forward."""

    @abstractmethod
    def projector_flops(self, config: Any, image_tokens: int) -> tuple[float, float]:
        """FLOPs of the projector's first layer, which needs no gradient of its input, and of the others, forward."""

    def vision_sizes(self, config: Any, image_tokens: int) -> VisionSizes:
        """What an image of so many image tokens takes in memory: here one view, whose states all stay to the end."""
        vision, width = config.vision_config, config.text_config.hidden_size
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        states = (vision.num_hidden_layers + 3) * vision.hidden_size + 3 * vision.intermediate_size
        layers = feature_layers(config)
        joined = 1 if isinstance(layers, int) else len(layers)
        return VisionSizes(
            pixels=vision.num_channels * vision.image_size**2,
            tower=patches * states,
            kept=image_tokens * (joined * vision.hidden_size + 2 * width),
            features=image_tokens * (2 * vision.hidden_size + 2 * width),
            copied=width**2,
        )
