"""Bytes that a training step needs beside weights, gradients and optimizer, and the moment when they are most.

Per token of a decoder layer (width d, MLP m, queries q and keys and values k wide, H heads) autograd keeps
- `2 (4 d + 4)`: the fp32 input of each RMSNorm and its inverse root;
- `(2 q + 2 k) e + 4 H`: queries, keys, values and output of a flash kernel, e bytes an element, and its log-sum-exp;
  eager attention keeps its S x S probabilities instead, in fp32 and again in half precision;
- `3 m e`: gate, its activation, up;
- the input of each LoRA branch and its rank-r product. Under autocast or dropout every branch has an input of its own,
  else branches with the same input share it; dropout adds its mask.

Without checkpointing all layers' bytes are alive when the backward pass starts. With it only each layer's input is, and
one layer's bytes come back at a time. The peak is the highest of: the forward pass's end, where dropped rows are put
back, the loss, the backward pass of each layer (earlier layers hold more tokens under pruning, later ones stand on more
saved layers), the ranking before a stage, and the vision tower. Assumes that the rows of a batch have equally many
tokens, so that no mask is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from himap_train.models.families import family_of_config
from himap_train.models.families.base import Family
from himap_train.models.families.sizes import VisionSizes
from himap_train.models.tower import cached_width, images_at_once
from himap_train.planning.facts import Activations, Batch, LayerLora, ModelFacts, Numerics
from himap_train.pruning.cost import head_width, image_tokens_per_layer, kv_width, tokens_before, widths
from himap_train.pruning.schedule import PruningSchedule
from himap_train.pruning.stage import PruningStage

_SHARED = {"q_proj": "norm", "k_proj": "norm", "v_proj": "norm", "gate_proj": "norm2", "up_proj": "norm2"}


@dataclass(frozen=True)
class ActivationModel:
    """Predicts `Activations` for a batch.

    Args:
        facts: Facts of the model.
        numerics: Bytes of an element.
        attention: "sdpa" or "flash_attention_2" (a flash kernel, no S x S matrix), or "eager".
        checkpointing: Whether layers run again in the backward pass.
        loss_chunk: Supervised positions whose logits exist at a time; 0 for all.
        cached: Whether features are, so that the tower runs before training, on few images at a time.
    """

    facts: ModelFacts
    numerics: Numerics
    attention: str
    checkpointing: bool
    loss_chunk: int
    cached: bool = False

    def __call__(self, schedule: PruningSchedule, batch: Batch) -> Activations:
        """Bytes under a schedule."""
        text: Any = self.facts.config.text_config
        layers = image_tokens_per_layer(schedule, self.facts.layers, batch.image_tokens)
        tokens = [batch.rows * (count + batch.text_tokens) for count in layers]
        rows = [count + batch.text_tokens for count in layers]
        saved = [self._layer(lora, t, r) for lora, t, r in zip(self.facts.lora, tokens, rows, strict=True)]
        inputs = [t * text.hidden_size * self.numerics.element for t in tokens]
        working = [self._working(*layer) for layer in zip(self.facts.lora, tokens, rows, saved, inputs, strict=True)]
        start = self._start(batch) + self._shared(batch, [rows[stage.layer] for stage in schedule.stages])
        end = tokens[-1] * (4 * text.hidden_size + 4 + text.hidden_size * self.numerics.element * bool(schedule.stages))
        full = batch.rows * batch.length * text.hidden_size * self.numerics.element
        logits, copies = self._logits(batch), 2 * self.facts.trained * self.numerics.mixed
        kept = inputs if self.checkpointing else saved
        moments = {
            "loss": start + sum(kept) + end + logits + (copies if self.checkpointing else 0),
            "final norm": start + sum(kept) + end + max(20 * tokens[-1] * text.hidden_size, 2 * full),
            "end of forward": start + sum(kept) + end + self._features(batch) + full * (3 if schedule.stages else 2),
            "vision tower": self._vision(batch),
        }
        for number, extra in enumerate(working):
            moments[f"backward of layer {number}"] = start + sum(kept[: number + 1]) + extra
        rankings = {stage.layer: self._choosing(schedule, stage, batch, layers) for stage in schedule.stages}
        for layer, size in rankings.items():
            moments[f"ranking before layer {layer}"] = start + sum(kept[:layer]) + size
        moment = max(moments, key=lambda name: moments[name])
        return Activations(
            saved=start + sum(kept) + end + logits // 3,
            logits=logits,
            working=max(working),
            ranking=max(rankings.values(), default=0),
            peak=moments[moment],
            moment=moment,
        )

    def _layer(self, lora: LayerLora, tokens: int, row: int) -> int:
        """Saved by one decoder layer."""
        text, e = self._text, self.numerics.element
        heads, q, k = text.num_attention_heads, text.num_attention_heads * head_width(text), kv_width(text)
        norms = 2 * (4 * text.hidden_size + 4)
        if self.attention == "eager":
            attention = 3 * q * e + heads * row * (4 if e == 4 else 4 + e)  # keys and values repeated for each head
        else:
            attention = (2 * q + 2 * k) * e + 4 * heads
        branches = self._branches(lora) + lora.rank * len(lora.inputs) * (2 if self.numerics.mixed else e)
        weights = 2 * lora.parameters * self.numerics.mixed  # autocast's copies in half precision
        return tokens * (norms + attention + branches + 3 * text.intermediate_size * e) + weights

    def _branches(self, lora: LayerLora) -> int:
        """Inputs of the LoRA branches and masks of their dropout, bytes a token."""
        e, dropout = self.numerics.element, self.facts.dropout > 0
        if self.numerics.mixed or dropout:
            return sum(lora.inputs.values()) * (e + self.numerics.mask * dropout)
        # A flash kernel keeps its output, which is o_proj's input, in any case.
        alone = {_SHARED.get(name, name): width for name, width in lora.inputs.items()}
        return e * sum(width for name, width in alone.items() if name != "o_proj" or self.attention == "eager")

    def _working(self, lora: LayerLora, tokens: int, row: int, saved: int, layer_input: int) -> int:
        """Temporaries at the worst moment of one layer's backward pass, on top of what is kept of it.

        d and m as above. Backward of down_proj: without autocast gradients of the LoRA branch, of the frozen weight and
        their sum; with it LoRA's runs in fp32. At the end of the layer's second forward: the incoming gradient, its
        scaled copy, the MLP's input and output, and the product of which LoRA took a copy.
        """
        e, d, m = self.numerics.element, self._text.hidden_size, self._text.intermediate_size
        down, dropout, mixed = "down_proj" in lora.inputs, self.facts.dropout > 0, self.numerics.mixed
        copied = down and (mixed or dropout)
        if not down:
            backward = (d + 3 * m) * e
        elif mixed:
            backward = d * e + m * (6 if dropout else 4)
        else:
            backward = d * e + m * e * (1 if dropout else 2)
        forward = 4 * d * e + m * e * copied + (4 * m * (1 + dropout) if mixed and down else 0)
        if self.attention == "eager":
            mlp = 3 * m * e + lora.inputs.get("down_proj", 0) * e
            backward = max(backward, 8 * self._text.num_attention_heads * row - mlp)
        if not self.checkpointing:
            return tokens * backward
        again = saved - (layer_input if e == 4 else 0)  # in fp32 the norm keeps the layer's input itself
        return again + tokens * max(backward, forward)

    @property
    def _text(self) -> Any:
        return self.facts.config.text_config

    def _sizes(self, batch: Batch) -> VisionSizes:
        """Sizes of one image."""
        return self._family.vision_sizes(self.facts.config, self._tokens(batch))

    @property
    def _family(self) -> Family:
        return family_of_config(self.facts.config)

    @staticmethod
    def _tokens(batch: Batch) -> int:
        """Image tokens of one image."""
        return round(batch.image_tokens / max(batch.images, 1))

    def _start(self, batch: Batch) -> int:
        """The batch itself and what the projector keeps, autocast's copies of its weights included."""
        sizes, e, trained = self._sizes(batch), self.numerics.element, self.facts.trains_projector
        stored = self._tokens(batch) * cached_width(self.facts.config) * e
        given = stored if self.cached else 4 * sizes.pixels
        image, ids = given + sizes.kept * e * trained, 3 * 8 * batch.length
        return batch.rows * (batch.images * image + ids) + 2 * sizes.copied * (self.numerics.mixed and trained)

    def _shared(self, batch: Batch, after_stages: list[int]) -> int:
        """What the layers share, once for the prefill and once after each stage: the rotary embedding.

        Under checkpointing eager's masks are kept for the second forward, and so are the token embeddings, into which
        transformers then lets gradients flow.
        """
        e, rotary = self.numerics.element, 2 * head_width(self._text) * self.numerics.element
        masks = [batch.length, *after_stages] if self.attention == "eager" and self.checkpointing else []
        embeddings = batch.length * self._text.hidden_size * e * self.checkpointing
        rows = rotary * sum(after_stages) + e * sum(length**2 for length in masks) + embeddings
        return batch.length * rotary + batch.rows * rows

    def _logits(self, batch: Batch) -> int:
        """One chunk: log-softmax, its gradient and the logits' gradient, all in fp32."""
        supervised = batch.rows * batch.supervised
        return 12 * self._text.vocab_size * (min(supervised, self.loss_chunk) if self.loss_chunk else supervised)

    def _choosing(self, schedule: PruningSchedule, stage: PruningStage, batch: Batch, layers: tuple[int, ...]) -> int:
        """What the stage's method says of itself."""
        if stage.removes_all:
            return 0
        image, text = tokens_before(schedule, stage, layers, batch.image_tokens), batch.text_tokens
        return batch.rows * stage.method.peak_bytes(widths(self._text), image, text, self.numerics.element)

    def _features(self, batch: Batch) -> int:
        """Image features that transformers holds until the decoder returns."""
        held = self._sizes(batch).features
        if self.cached:  # what the projector gives now, if it runs at all
            held = self._tokens(batch) * self._text.hidden_size * self._family.projects_cached
        return batch.rows * batch.images * held * self.numerics.element

    def _vision(self, batch: Batch) -> int:
        """The tower's pass; a batch of text runs it on one blank image."""
        sizes = self._sizes(batch)
        tower = sizes.tower * self.numerics.element
        if self.cached:
            return images_at_once(self._family) * (tower + 4 * sizes.pixels)
        return max(batch.rows * batch.images, 1) * tower + self._start(batch)
