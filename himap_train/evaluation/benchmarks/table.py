"""The benchmarks by name, one entry each. A new one is a line here, unless it needs logic of its own.

Prompts are those of LLaVA-1.5's own question files, and lmms-eval's where it has none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SHORT = "{question}\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Benchmark:
    """What the columns of a benchmark's files mean, and how it is asked and scored.

    A column may be one of several ("question|query": the first that the file has) or lie within another
    ("types.structural").

    Attributes:
        prompt: What is asked, with columns in braces; see `Prompt`.
        metrics: Names from `METRICS`; none for what judges or servers score.
        max_new_tokens: Where an answer is cut.
        split: Of the Hugging Face data set, where the user names none.
        config: Of the Hugging Face data set, where it has several.
        images: Config that holds the images alone, by `id`; `group` names them (GQA).
        image: Column of the image, or of a list of them; several columns with commas.
        question: Column of the question.
        answer: Column of the accepted answers.
        options: Column with the list of options, or one column an option, with commas.
        numbered: Answers are the numbers of options, from 0.
        type: Column of the category; "with_image" for image and text apart.
        key: Column that names a question.
        group: Column that questions about one image share; by default the image itself.
        only: Column and its value in the rows that count.
        without: Text that is taken out of questions.
        match: What an answer file and LLaVA's question file share; see `llava_files`.
        export: What a judge or server takes; see `export`.
        needs_image: A file without a column of images is not its file.
        blind_rows: Whether rows may have no image all the same.
    """

    prompt: str = SHORT
    metrics: tuple[str, ...] = ("exact",)
    max_new_tokens: int = 16
    split: str = "test"
    config: str = ""
    images: str = ""
    image: str = "image|images"
    question: str = "question"
    answer: str = "answer"
    options: str = ""
    numbered: bool = False
    type: str = ""
    key: str = "question_id|id"
    group: str = ""
    only: tuple[str, str] | None = None
    without: str = ""
    match: tuple[str, ...] = ("question_id",)
    export: str = ""
    needs_image: bool = True
    blind_rows: bool = False


_VQA = Benchmark(metrics=("vqa",), split="validation", answer="answers", export="vqa")
_TEXTVQA = replace(_VQA, metrics=("textvqa",), max_new_tokens=128, match=("image_id", "question"))
_DOCVQA = replace(_VQA, metrics=("anls",), max_new_tokens=32, config="DocVQA", key="questionId", export="docvqa")
_CHOICE = Benchmark("{question}\n{options}" + LETTER, ("choice",), options="options")
_MMBENCH = Benchmark(
    "{hint}\n{question}\n{options}" + LETTER,
    ("circular", "choice"),
    split="dev",
    config="en",
    options="A,B,C,D,E",
    type="category",
    key="index",
    export="mmbench",
)
_JUDGED = Benchmark("{question}", (), max_new_tokens=1024, export="mmvet")
_CAPTION = Benchmark("Provide a one-sentence caption for the provided image.", ("cider",), 64, answer="answer|caption")

BENCHMARKS = {
    "pope": Benchmark(SHORT, ("pope",), 128, type="category", match=("category", "image", "question")),
    "textvqa": _TEXTVQA,
    "textvqa-ocr": replace(_TEXTVQA, prompt=SHORT.replace("\n", "\nReference OCR token: {ocr_tokens}\n")),
    "vqav2": replace(_VQA, type="answer_type"),
    "vizwiz": replace(
        _VQA,
        prompt=SHORT.replace("\n", "\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"),
        max_new_tokens=128,
        split="val",
        type="category",
        match=("image",),
        export="vizwiz",
    ),
    "gqa": Benchmark(
        metrics=("gqa",),
        split="testdev",
        config="testdev_balanced_instructions",
        images="testdev_balanced_images",
        type="types.structural",
        group="imageId",
    ),
    "mme": Benchmark(
        metrics=("mme",),
        type="category",
        group="question_id",
        without=" Please answer yes or no.",
        match=("category", "stem", "question"),
    ),
    "scienceqa": Benchmark(
        "Context: {hint:N/A}\nQuestion: {question}\nOptions: {options_in_line}" + LETTER,
        ("choice-strict", "choice"),
        options="choices",
        numbered=True,
        type="with_image",
        blind_rows=True,
    ),
    "chartqa": Benchmark(
        "{question}\nAnswer the question with a single word.",
        ("relaxed",),
        question="question|query",
        answer="answer|label",
        type="type|human_or_machine",
    ),
    "docvqa": _DOCVQA,
    "infovqa": replace(_DOCVQA, config="InfographicVQA"),
    "ai2d": replace(_CHOICE, numbered=True),
    "seed": replace(
        _CHOICE, options="choice_a,choice_b,choice_c,choice_d", type="question_type_id", only=("data_type", "image")
    ),
    "mmbench": _MMBENCH,
    "mmbench-cn": replace(_MMBENCH, prompt="{hint}\n{question}\n{options}\n请直接回答选项字母。", config="cn"),
    "mmvet": _JUDGED,
    "llava-bench": replace(_JUDGED, split="train", type="category", export="llava-bench"),
    "coco-caption": replace(_CAPTION, split="val"),
    "flickr30k": _CAPTION,
    "nocaps": replace(_CAPTION, split="validation", answer="annotations_captions"),
}
