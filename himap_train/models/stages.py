"""The stages of one prefill: what leaves between two layers, and what training learns from it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from himap_train.models.attention import ScoreCollector
from himap_train.models.choosing import collector_for, ranked, show, token_map
from himap_train.models.foresight import taught
from himap_train.models.installed import InstalledPruning, PruneCounts, scorers_of
from himap_train.models.tokens import Prefill, Tokens, removed
from himap_train.pruning.layout import TokenCounts, TokenLayout
from himap_train.pruning.learned.marginal import marginal_tokens
from himap_train.pruning.methods.base import Seen
from himap_train.pruning.removal import Removal, plan_removals, settle_mass, settle_waiting


class Stages:
    """Carries out a schedule's stages, in the order of their layers.

    Args:
        prefill: What all removals have in common.
        counts: Of the batch.
    """

    def __init__(self, prefill: Prefill, counts: TokenCounts) -> None:
        pruning: InstalledPruning = prefill.decoder.himap_pruning
        self._prefill, self._removals = prefill, plan_removals(pruning.schedule.stages, counts)
        self._scorers = scorers_of(prefill.decoder)
        learns = torch.is_grad_enabled()
        self._ratios, self._learn = (pruning.ratios, pruning.learn) if learns else (None, None)
        self._traces = pruning.traces
        self._watching = [trace for trace in pruning.traces if trace.watches]
        self._always = self._ratios is not None or bool(self._watching)  # rank where nothing leaves, too
        self._counts, self._layouts = PruneCounts(counts.image), list[TokenLayout]()

    def collector(self, number: int, tokens: Tokens, layout: TokenLayout) -> ScoreCollector | None:
        """What the layer before layer `number` reports to."""
        return collector_for(self._removals.get(number), tokens, layout, self._always)

    def leave(
        self, number: int, tokens: Tokens, layout: TokenLayout, collector: ScoreCollector | None
    ) -> tuple[Tokens, TokenLayout]:
        """What layer `number` runs on."""
        removal = self._removals.get(number)
        if removal is None:
            return tokens, layout
        if removal.removes or self._always:
            shown = show(removal, tokens, layout, collector, self._scorers.get(number))
            shown = replace(shown, learns=self._learn is not None)
            for trace in self._watching:
                trace.shown[number] = shown
            removal = self._settled(number, shown)
            ranks = ranked(removal, shown)
            if self._ratios is not None and removal.stage.method.ranks:  # a set has no marginal tokens
                carried = tokens.marginal.moved if tokens.marginal else None
                marginal = marginal_tokens(self._ratios[number], ranks, layout, removal, carried)
                tokens = replace(tokens, marginal=marginal)
            if removal.removes or tokens.marginal:
                moved = token_map(removal, shown, ranks, tokens)
                tokens, layout = removed(self._prefill, number, tokens, layout, moved)
                if self._learn is not None and removal.stage.method.learns:
                    taken = partial(self._learn, number)
                    tokens = replace(tokens, hidden=taught(tokens.hidden, taken, shown, layout, removal.after))
        self._counts.kept_rows.append(removal.after.current.sum(1))
        self._layouts.append(layout)
        return tokens, layout

    def _settled(self, number: int, shown: Seen) -> Removal:
        """The removal once scores say how many stay, where they do."""
        if shown.looks is not None:
            self._removals = settle_waiting(self._removals, number, shown.looks, shown.layout)
        elif shown.scores is not None:
            self._removals = settle_mass(self._removals, number, shown.scores, shown.layout)
        return self._removals[number]

    def record(self) -> PruneCounts:
        """What was kept, for whoever watches."""
        for trace in self._traces:
            trace.kept = [
                [row[real].cpu() for row, real in zip(at.columns, at.valid, strict=True)] for at in self._layouts
            ]
        return self._counts
