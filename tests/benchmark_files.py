"""Benchmark files with the columns that they are distributed with, and small made-up content."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
from evaluation_toys import image

IMAGE = datasets.Image()


def save(folder: Path, rows: list[dict[str, Any]], split: str = "test", config: str = "", **kinds: Any) -> Path:
    """Rows as the hub keeps them: folder/[config/]split-00000-of-00001.parquet; columns called `image` are images."""
    dataset = datasets.Dataset.from_list(rows)
    for name in ("image",) if "image" in rows[0] else ():
        kinds.setdefault(name, IMAGE)
    for name, kind in kinds.items():
        dataset = dataset.cast_column(name, kind)
    path = folder / (config or "data")
    path.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(str(path / f"{split}-00000-of-00001.parquet"))
    return folder


def png(number: int) -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    image(number).save(file, "PNG")
    return file.getvalue()


def picture(number: int) -> dict[str, Any]:
    """A picture as a row has it."""
    return {"bytes": png(number), "path": None}


def pope(folder: Path) -> Path:
    rows = [
        {
            "id": str(i),
            "question_id": str(i + 1),
            "question": f"Is there a {'cat' if i < 3 else 'dog'} in the image?",
            "answer": ("yes", "no")[i % 2],
            "image_source": "COCO_val2014_000000310196",
            "image": picture(i // 2),
            "category": ("adversarial", "popular", "random")[i % 3],
        }
        for i in range(6)
    ]
    return save(folder, rows)


def textvqa(folder: Path, answers: bool = True) -> Path:
    row = {"image_id": "0054", "question_id": 7, "question": "what brand is this?", "image": picture(1)}
    return save(
        folder,
        [row | {"answers": ["nokia"] * 9 + ["htc"] if answers else [], "ocr_tokens": ["NOKIA", "3310"]}],
        "validation",
    )


def vqav2(folder: Path) -> Path:
    answers = [{"answer": "net", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    row = {"question_type": "what", "multiple_choice_answer": "net", "answers": answers, "answer_type": "other"}
    return save(
        folder, [row | {"image_id": 1, "question_id": 3, "question": "Where?", "image": picture(1)}], "validation"
    )


def gqa(folder: Path, images: int = 2) -> Path:
    rows = [
        {
            "id": f"q{i}",
            "imageId": f"n{i // 2}",
            "question": f"Is it overcast {i}?",
            "answer": "no",
            "fullAnswer": "No, it is not overcast.",
            "types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"},
        }
        for i in range(4)
    ]
    save(folder, rows, "testdev", "testdev_balanced_instructions")
    return save(
        folder, [{"id": f"n{i}", "image": picture(i)} for i in range(images)], "testdev", "testdev_balanced_images"
    )


def mme(folder: Path) -> Path:
    rows = [
        {
            "question_id": f"{kind}/{number:04d}.png",
            "image": picture(0),  # of two questions in several categories: the name tells them apart
            "question": "Is there a red coat in the image? Please answer yes or no.",
            "answer": answer,
            "category": kind,
        }
        for kind in ("color", "code_reasoning")
        for number in range(2)
        for answer in ("Yes", "No")
    ]
    return save(folder, rows)


def scienceqa(folder: Path) -> Path:
    choices = ["1", "2", "0"]  # options that look like numbers of options
    rows = [
        {"image": picture(1), "question": "How many?", "choices": choices, "answer": 1, "hint": ""},
        {"image": None, "question": "Which?", "choices": ["a cat", "a dog"], "answer": 0, "hint": "See here."},
    ]
    return save(folder, rows, answer=datasets.Value("int8"))


def chartqa(folder: Path) -> Path:
    row = {"image": picture(1), "query": "How many?", "label": ["14"], "human_or_machine": 1}
    return save(folder, [row], human_or_machine=datasets.ClassLabel(names=["human", "machine"]))


def chartqa_lmms(folder: Path) -> Path:
    return save(folder, [{"type": "human_test", "question": "How many?", "answer": "14", "image": picture(1)}])


def ai2d(folder: Path) -> Path:
    return save(folder, [{"question": "Which?", "options": ["ant", "bee"], "answer": "1", "image": picture(1)}])


def seed(folder: Path) -> Path:
    options = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"}
    row = options | {"answer": "C", "question": "How many?", "question_type_id": 5, "image": [picture(1)]}
    rows = [row | {"data_type": "video", "question_id": "v1"}, row | {"data_type": "image", "question_id": "101669"}]
    return save(folder, rows, image=datasets.List(IMAGE))


def docvqa(folder: Path, split: str = "validation") -> Path:
    row = {"questionId": "337", "question": "What is the date?", "image": picture(1), "docId": 279}
    answers = ["1/8/93", "January 8"] if split == "validation" else None
    return save(folder, [row | {"answers": answers}], split, "DocVQA", answers=datasets.List(datasets.Value("string")))


def mmbench(folder: Path, rotated: bool = False, answers: bool = True) -> Path:
    """TSV of two questions, of three and two options. With rotations the image of the second is named by its index."""
    rows = [
        {"index": 5, "question": "Which?", "hint": "Look.", "A": "ant", "B": "bee", "C": "cow", "answer": "B"},
        {"index": 9, "question": "Where?", "hint": "nan", "A": "in", "B": "out", "C": "", "answer": "A"},
    ]
    for number, row in enumerate(rows):
        row |= {"D": "", "category": "nature", "image": base64.b64encode(png(number)).decode()}
    if rotated:
        rows.append(rows[1] | {"index": 1_000_009, "A": "out", "B": "in", "answer": "B", "image": "9"})
    if not answers:
        rows = [{name: value for name, value in row.items() if name != "answer"} for row in rows]
    path = folder / "mmbench.tsv"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def llava_questions(path: Path, *texts: str, suffix: str = "", **more: Any) -> Path:
    """LLaVA's question file about pictures 0.png, 1.png, ... beside it."""
    rows = [
        {"question_id": number, "image": f"{number}.png", "text": text + suffix, "category": "default"} | more
        for number, text in enumerate(texts)
    ]
    lines(path, rows)
    for number in range(len(texts)):
        (path.parent / f"{number}.png").write_bytes(png(number))
    return path
