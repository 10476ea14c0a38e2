"""The model that lmms-eval runs: any checkpoint under any schedule, through the functions of recipes/evaluate.py.

Requests of chat tasks have the arguments context, messages of a document, generation options, number of the document,
task and split; those of simple tasks context, generation options or continuation, images of a document, and the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from itertools import islice
from typing import Any, NoReturn, TypeVar, get_args

from accelerate import PartialState

from himap_train.bar import progress_bar
from himap_train.checkpoints.load import AS_SAVED, Dtype, installed_schedule, load_with_schedule
from himap_train.data.batches import collate, pad_token_id_of
from himap_train.data.encode import Encoder, Sample
from himap_train.data.records import Conversation, RecordError, Turn
from himap_train.data.skips import SkipLog
from himap_train.evaluation.answering import answer_batch, answer_losses, evaluation_mode
from himap_train.evaluation.budgeted import SAMPLES, check_budget_argument, prompt_tokens, require_stages, run_at_budget
from himap_train.evaluation.lmms_eval import harness
from himap_train.evaluation.lmms_eval.requests import Answering, to_conversation, user_message
from himap_train.evaluation.result import SampleTokens, report
from himap_train.models.families.base import AspectRatio
from himap_train.models.install import change_schedule
from himap_train.models.stock import base_model
from himap_train.processes import from_all
from himap_train.pruning.names import check_keys, require_number
from himap_train.pruning.reading import ScheduleArgument
from himap_train.pruning.schedule import PruningSchedule
from himap_train.structured import plain_yaml

Request = Any
"""`lmms_eval.api.instance.Instance`."""
Outcome = TypeVar("Outcome")


class Himap(harness("api.model").lmms):  # type: ignore[misc]
    """Chat tasks, which is what lmms-eval takes unless told `--force_simple`.

    Args:
        pretrained: "embedded", a run or adapter folder, a merged folder, or any stock model of a known family.
        schedule: as-saved, none, a preset, a pruning.yaml, or the stages inline, as JSON.
        budget: Run that schedule's layers at this flops_ratio of the mean prompt of each task's first 256 documents.
        batch_size: Prompts in a batch; `--batch_size` of the harness.
        device: "auto", "cpu", "cuda:1", ...; `--device` of the harness. Each of several processes has its own.
        dtype: "auto" (as the weights are stored), "float32", "bfloat16" or "float16".
        image_aspect_ratio: By default as the checkpoint was trained; "pad" makes images square first, as LLaVA-1.5 was.
        max_skipped: Documents of a task that may be unusable (answered with nothing): a number, or a fraction below 1.
        **unknown: Refused; the nearest is named.

    Raises:
        ValueError: An argument is missing, unknown or cannot be, or budget and schedule contradict.
        FileNotFoundError: As `load_with_schedule`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        schedule: ScheduleArgument = AS_SAVED,
        budget: float | None = None,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: Dtype = "auto",
        image_aspect_ratio: AspectRatio | None = None,
        max_skipped: int | float = 0.01,
        **unknown: Any,
    ) -> None:
        super().__init__()
        check_keys("--model_args", unknown, list(signature(Himap).parameters)[:-1])
        if not pretrained:
            raise ValueError("--model_args names no checkpoint: pretrained=runs/mine, a hub id, or embedded")
        if not str(batch_size).isdigit() or not int(batch_size):
            raise ValueError(f"--batch_size is {batch_size!r}; expected a number from 1 on")
        if image_aspect_ratio not in (None, *get_args(AspectRatio)):
            raise ValueError(f"image_aspect_ratio is {image_aspect_ratio!r}; expected one of {get_args(AspectRatio)}")
        if isinstance(schedule, str) and schedule.startswith("{"):
            schedule = plain_yaml(schedule)
        if budget is not None:
            require_number("--model_args", "budget", budget)
            if self.is_simple:
                raise ValueError(
                    "--force_simple with budget: give the schedule that recipes/evaluate.py --budget prints"
                )
        check_budget_argument(budget, schedule)
        processes = PartialState()
        self._rank, self._world_size = processes.process_index, processes.num_processes
        place = str(processes.device) if self._world_size > 1 else device
        self.model, processor = load_with_schedule(str(pretrained), schedule, dtype, place)
        if budget is not None:
            require_stages(self.model, budget)
        self._config: Any = base_model(self.model).config
        self.device = next(self.model.parameters()).device
        self._context: int = self._config.text_config.max_position_embeddings
        self._encoder = Encoder(processor, self._context - 1, image_aspect_ratio)
        self._batch_size, self._budget, self._max_skipped = int(batch_size), budget, max_skipped
        self._schedule = installed_schedule(self.model)
        self._ran: dict[str, tuple[PruningSchedule, list[SampleTokens]]] = {}

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Answers, in the order of the requests; empty for an unusable document.

        Raises:
            TooManySkippedError: There are more of those than `max_skipped`.
            ValueError: A task shows videos, asks for an unknown option, or has no images to have a budget for.
        """
        hows = [Answering.of(request.args[1 if self.is_simple else 2]) for request in requests]

        def answer(rows: list[int], samples: list[Sample]) -> tuple[list[str], list[SampleTokens]]:
            how, processor = hows[rows[0]], self._encoder.processor
            batch = collate(samples, pad_token_id_of(processor.tokenizer), padding_side="left")
            room = min(how.max_new_tokens, self._context - batch["input_ids"].shape[1])
            texts, tokens = answer_batch(self.model, processor, batch, room, how.search)
            return [how.cut(text) for text in texts], tokens

        return self._run(requests, self._encoder.encode_prompt, answer, "")

    def loglikelihood(self, requests: Sequence[Request]) -> list[Any]:
        """Mean losses of the continuations, infinite for an unusable document, and whether greedy decoding would give
        them, in pairs.

        Losses: the harness takes the smallest, whatever the method is called, and its own models give these. The end
        token is part of an answer, as in training.

        Raises:
            NotImplementedError: A task ranks by mutual information, which asks about continuations without a question.
            TooManySkippedError: As in `generate_until`.
        """
        if any(len(request.args) != 6 for request in requests):
            raise NotImplementedError("acc_mutual_info is not supported by model himap; take acc or acc_norm")

        def rank(rows: list[int], samples: list[Sample]) -> tuple[list[tuple[float, bool]], list[SampleTokens]]:
            return answer_losses(self.model, collate(samples, pad_token_id_of(self._encoder.processor.tokenizer)))

        found = self._run(requests, self._encoder.encode, rank, (math.inf, False))
        return [harness("api.instance").GenerationResult(pair) for pair in found]  # 0.7.3 makes a text of anything else

    def generate_until_multi_round(self, requests: Sequence[Request]) -> NoReturn:
        """Refuse tasks of several rounds with a NotImplementedError."""
        raise NotImplementedError(
            f"task {requests[0].task_name} asks in several rounds, each built on the answers before; model himap "
            "answers tasks of one round: leave it out"
        )

    def clean(self) -> None:
        """Print what was run of each task, over all processes, and let the model go; the harness calls it once."""
        parts = from_all(self._ran)
        for task, (schedule, _) in {task: ran for part in parts for task, ran in part.items()}.items():
            if self._rank == 0:
                samples = [sample for part in parts if task in part for sample in part[task][1]]
                print(f"himap: {task}: {report(samples, schedule, self._config)}")
        super().clean()

    def _run(
        self,
        requests: Sequence[Request],
        encode: Callable[[Conversation], Sample],
        answer: Callable[[list[int], list[Sample]], tuple[list[Outcome], list[SampleTokens]]],
        nothing: Outcome,
    ) -> list[Outcome]:
        """What `answer` makes of each request, in batches of one task, the longest first."""
        found = [nothing] * len(requests)
        groups: dict[str, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(request.task_name, []).append(row)
        with progress_bar("lmms-eval", len(requests), self._rank == 0) as advance, evaluation_mode(self.model):
            for task, rows in groups.items():
                self._start(task, requests[rows[0]])
                skipped = SkipLog(len(rows), self._max_skipped)
                rows.sort(key=lambda row: len(requests[row].args[0]), reverse=True)
                for start in range(0, len(rows), self._batch_size):
                    used, samples = [], []
                    for number, row in enumerate(rows[start : start + self._batch_size], start):
                        try:
                            samples.append(encode(self._asked(requests[row])))
                            used.append(row)
                        except RecordError as error:
                            skipped.add(number, error)
                    outcomes, tokens = answer(used, samples) if used else ([], [])
                    for row, outcome, ran in zip(used, outcomes, tokens, strict=True):
                        found[row] = outcome
                        if "__padding_only__" not in requests[row].metadata:  # asked so that all processes have as many
                            self._ran[task][1].append(ran)
                    advance(self._batch_size)
        return found

    def _start(self, task: str, request: Request) -> None:
        """Let the schedule of a task run; the same in all processes, each of which has all documents."""
        if task not in self._ran:
            change_schedule(self.model, self._schedule)
            if self._budget is not None:
                documents = self.task_dict[request.args[4]][request.args[5]]
                prompts = [self._asked(request, document) for document in islice(documents, SAMPLES)]
                encoder = self._encoder
                tokens = prompt_tokens(prompts, encoder.processor, encoder.image_aspect_ratio)
                run_at_budget(self.model, self._budget, *tokens)
            self._ran[task] = installed_schedule(self.model), []
        change_schedule(self.model, self._ran[task][0])

    def _asked(self, request: Request, document: Any = None) -> Conversation:
        """The question of a request, about its own document or another, with the continuation where one is given."""
        context, first, second, number, task, split = request.args
        document = self.task_dict[task][split][number] if document is None else document
        messages = user_message(second(document), context) if self.is_simple else first(document)
        asked = to_conversation(f"{task} {number}", messages)
        if not self.is_simple or isinstance(first, Mapping):
            return asked
        answer = first if isinstance(first, str) else first(document)
        return replace(asked, turns=(*asked.turns, Turn("assistant", answer.strip())))


class SimpleHimap(Himap):
    """Tasks that rank answers, which lmms-eval asks in its older form alone: `--force_simple`."""

    is_simple = True
