"""Malformed data: status 2 and a message that names file or record, or the record skipped and counted; nothing runs."""

from __future__ import annotations

import base64
import gzip
import json
import os
import pickle
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from attacks import harmless, in_little_memory, the_error
from data_examples import image_folder, llava_record
from recipes_cli import run_recipe
from tiny import tiny_processor
from training_toys import finetune, save_tiny

from himap_train.data.llava_file import LlavaFile
from himap_train.data.module import LlavaDataModule
from himap_train.data.skips import TooManySkippedError
from himap_train.data.sources import open_source

DEEP = 100_000
DIGITS = "9" * 5000
SURROGATE = "caf\ud83d"
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MEGABYTES = 700


def record(image: Any = None, question: str = "q", answer: Any = "a", **more: Any) -> str:
    return json.dumps({**llava_record("bad", image, question, answer), **more})


def turns(*values: Any, **more: Any) -> str:
    return json.dumps({"id": "bad", "conversations": list(values), **more})


def shown(image: Any) -> str:
    return record(image, "<image>\nq")


RECORDS: dict[str, tuple[str | bytes, str]] = {
    "half an emoji in a question": (record(question=SURROGATE), r"conversations\[0\]: `value` has half a character"),
    "half an emoji in an answer": (record(answer=SURROGATE), r"conversations\[1\]: `value` has half a character"),
    "half an emoji in a path": (shown(SURROGATE + ".png"), "half a character, which no file name has"),
    "half an emoji in the id": (record(id=SURROGATE), "`id` has half a character"),
    "half an emoji in a fact": (record(type=SURROGATE), "type.* has half a character"),
    "half an emoji in a key": (record(**{SURROGATE: "x"}), "half a character"),
    "half an emoji among answers": (record(answers=["a", SURROGATE]), "answers.* has half a character"),
    "half an emoji, system": (
        turns({"from": "system", "value": SURROGATE}, *TURNS),
        r"conversations\[0\]: `value` has",
    ),
    "half an emoji as bytes": (record().encode().replace(b'"q"', b'"\xed\xa0\xbd"'), "has half a character"),
    "not UTF-8": (record().encode().replace(b'"q"', b'"caf\xe9"'), r"record 3: not JSON \('utf-8' codec"),
    "data URI": (shown("data:image/png;base64," + "A" * 9000), "the image is 'data:image/png.*read from files alone"),
    "base64": (shown(base64.b64encode(bytes(range(256)) * 20).decode()), r"has 6828 characters .*\(base64\), store it"),
    "5000 characters": (shown("a" * 5000), "the image path has 5000 characters"),
    "long name": (shown("a" * 300 + ".png"), "the image path has 304 characters"),
    "many folders": (shown("a/" * 3000), "the image path has 6000 characters"),
    "NUL": (shown("a\0.png"), r"the image path is 'a\\x00.png'"),
    "absolute": (shown("/etc/passwd"), "'/etc/passwd' leaves the image folder"),
    "upwards": (shown("sub/../../../etc/passwd"), "leaves the image folder"),
    "a folder": (shown("sub"), "sub is broken|sub is not"),
    "the folder itself": (shown("."), "leaves the image folder"),
    "no path": (shown(""), "the image path is ''"),
    "blanks": (shown("  "), "the image path is '  '"),
    "not there": (shown("gone.png"), "gone.png does not exist; check image_folder"),
    "URL": (shown("https://host/a.png"), "read from files alone"),
    "file URL": (shown("file:///etc/passwd"), "leaves the image folder"),
    "link out": (shown("out/a.png"), "leaves the image folder .*follow_links: true"),
    "link to itself": (shown("loop.png"), "loop.png"),
    "text as an image": (shown("text.png"), "text.png is not an image"),
    "image 7": (shown(7), "an image is int 7"),
    "image true": (shown(True), "an image is bool True"),
    "image NaN": (shown(float("nan")), "an image is float nan"),
    "image as an object": (shown({"file": "a.png"}), "an image is dict"),
    "image null in a list": (shown([None]), "an image is NoneType"),
    "images in a list of lists": (shown([["a.png"]]), "an image is list"),
    "deep lists": ("[" * DEEP + "]" * DEEP, "record 3: lists or objects within one another too deep"),
    "deep objects": ('{"a":' * DEEP + "1" + "}" * DEEP, "record 3: lists or objects within one another too deep"),
    "deep fact": (record()[:-1] + ', "x": ' + "[" * DEEP + '"]{"' + "]" * DEEP + "}", "record 3: .* too deep"),
    "deep but readable": (shown(None)[:-1] + ', "image": ' + "[" * 400 + "]" * 400 + "}", "an image is list"),
    "5000 digits as the id": (record()[:-1] + f', "x": {DIGITS}}}', "record 3: not JSON .*4300"),
    "5000 digits as a text": (record().replace('"q"', DIGITS), "record 3: not JSON .*4300"),
    "5000 digits": (DIGITS, "record 3: not JSON .*4300"),
    "1e999 as a text": (record().replace('"q"', "1e999"), "`value` is float inf"),
    "a list": ("[]", "record 3: expected an object with `conversations` or `messages`, found list"),
    "a text": ('"x, ]"', "record 3: expected an object with `conversations` or `messages`, found str"),
    "null": ("null", "record 3: expected an object with `conversations` or `messages`, found NoneType"),
    "a number": ("5", "record 3: expected an object with `conversations` or `messages`, found int"),
    "no keys": ("{}", r"no key `conversations` and no `messages`, found the keys \[\]"),
    "many keys": (json.dumps({str(n): n for n in range(10_000)}), "no key `conversations` and no `messages`.{20,230}$"),
    "conversations null": (record(conversations=None), "`conversations` is NoneType None"),
    "conversations text": (record(conversations="q"), "`conversations` is str 'q'"),
    "conversations an object": (record(conversations={"from": "human"}), "`conversations` is dict"),
    "no turns": (turns(), r"record 3 \(id 'bad'\) has no (question|answer to compare with)"),
    "turn null": (turns(None), r"conversations\[0\]: expected the keys"),
    "turn a list": (turns([]), r"conversations\[0\]: expected the keys"),
    "turn without value": (turns({"from": "human"}), r"conversations\[0\]: expected the keys `from` and `value`"),
    "from a list": (
        turns({"from": ["gpt"], "value": "x"}),
        r"conversations\[0\]: `from` is \['gpt'\]; expected one of",
    ),
    "from an object": (turns({"from": {}, "value": "x"}), r"`from` is \{\}; expected one of"),
    "from null": (turns({"from": None, "value": "x"}), "`from` is None; expected one of"),
    "from nobody": (turns({"from": "bard" * 999, "value": "x"}), "`from` is 'bard.{,80}; expected one of"),
    "value null": (record(answer=None), r"conversations\[1\]: `value` is NoneType None; expected text"),
    "value a list": (record(answer=["a"]), r"`value` is list \['a'\]; expected text"),
    "value an object": (record(answer={"a": 1}), r"`value` is dict .*; expected text"),
    "value NaN": (record(answer=float("nan")), "`value` is float nan; expected text"),
    "value true": (record(answer=True), "`value` is bool True; expected text"),
    "asked twice": (turns(TURNS[0], TURNS[0], TURNS[1]), "turn 1 is of the user, expected the assistant"),
    "answered first": (turns(TURNS[1]), "turn 0 is of the assistant, expected the user"),
    "no answer": (turns(TURNS[0]), r"record 3 \(id 'bad'\) has (a question but )?no answer"),
    "no image": (record(None, "<image>\nq"), "1 <image> in the conversation but 0 image"),
    "no place": (record("a.png", "q"), "0 <image> in the conversation but 1 image"),
    "image in an answer": (record("a.png", "q", "<image>"), "<image> in a turn that is not the user's"),
    "a million places": (record("a.png", "<image>" * 100_000), "100000 <image> in the conversation but 1 image"),
    "a key twice": (record()[:-1] + ', "conversations": []}', "an object has the key 'conversations' twice"),
    "a value twice": (record().replace('"value": "a"', '"value": "a", "value": "b"'), "the key 'value' twice"),
    "id a list": (record(id=["x"]), r"`id` is list \['x'\]; expected text or a number"),
    "id an object": (record(id={}), "`id` is dict"),
    "long id": (record(id="x" * 5000), "`id` has 5000 characters; at most 1000"),
    "two million characters": (record(question="word " * 400_000), "2000001 characters in 2 turns; at most 1048576"),
    "5000 turns": (turns(*TURNS * 2500), "5000 characters in 5000 turns; at most"),
}

GOOD = [llava_record(str(n), "a.png", "<image>\nq", "a") for n in range(3)]
LIST = json.dumps(GOOD).encode()
LINES = "".join(json.dumps(one) + "\n" for one in GOOD).encode()
PACKED = gzip.compress(LINES)


class Runs:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("x.json", b"", "x.json is not JSON: Expecting value at line 1"),
    "blank": ("x.json", b" \n ", "x.json is not JSON: Expecting value at line 2"),
    "no records": ("x.json", b"[]", "x.json holds no records"),
    "no lines": ("x.jsonl", b"\n \n", "x.jsonl holds no records"),
    "null": ("x.json", b"null", "x.json: expected a list of records, found NoneType"),
    "a number": ("x.json", DIGITS.encode(), "x.json: expected a list of records, found float"),
    "an object of records": ("x.json", json.dumps({"0": GOOD[0]}).encode(), r"found the keys \['0'\]"),
    "an object of many": ("x.json", json.dumps({"k" * 999 + str(n): 1 for n in range(99)}).encode(), "found the keys"),
    "comma behind": ("x.json", LIST[:-1] + b",\n]", "x.json is not JSON: a comma behind the last record at line 2"),
    "comma inside": ("x.json", LIST.replace(b'"a"}]', b'"a",}]'), "x.json is not JSON: .* at line 1, column"),
    "no comma": ("x.json", LIST.replace(b'}, {"id"', b'}\n{"id"'), "Expecting ',' delimiter at line 2, column 1"),
    "cut off": ("x.json", LIST[:-20], "x.json is not JSON: .* at line 1"),
    "no end": ("x.json", LIST[:-1], "x.json is not JSON: Expecting ',' delimiter at line 1"),
    "two lists": ("x.json", LIST + b"\n" + LIST, "Extra data at line 2, column 1; one record a line is JSONL"),
    "lines": ("x.json", LINES, "Extra data at line 2, column 1; one record a line is JSONL"),
    "python": ("x.json", repr(GOOD).encode(), "x.json is not JSON"),
    "comment": ("x.json", b"// mine\n" + LIST, "x.json is not JSON: Expecting value at line 1, column 1"),
    "bad escape": ("x.json", LIST.replace(b"a.png", b"a\\q.png"), r"x.json is not JSON: Invalid \\escape"),
    "deep": ("x.json", b"[" * DEEP, "x.json is not JSON"),
    "deep object": ("x.json", b'{"a":' * DEEP, "x.json: expected a list of records, found .* too deep"),
    "UTF-16": ("x.json", LIST.decode().encode("utf-16"), "x.json is not UTF-8 text but seems to be UTF-16; .*iconv"),
    "UTF-16 lines": ("x.jsonl", LINES.decode().encode("utf-16"), "x.jsonl is not UTF-8 text but seems to be UTF-16"),
    "UTF-16 unmarked": ("x.jsonl", LINES.decode().encode("utf-16-le"), "seems to be UTF-16-LE"),
    "UTF-32": ("x.json", LIST.decode().encode("utf-32"), "x.json is not UTF-8 text but seems to be UTF-32"),
    "UTF-16 packed": ("x.json.gz", gzip.compress(LIST.decode().encode("utf-16")), "seems to be UTF-16"),
    "zeros": ("x.jsonl", bytes(4096), "x.jsonl is not UTF-8 text"),
    "a picture": ("x.json", b"\x89PNG\r\n\x1a\n" + bytes(99), "x.json is not JSON"),
    "COCO": ("x.json", b'{"images": [], "annotations": []}', r"found the keys \['annotations', 'images'\]"),
    "captions": ("x.json", b'[{"image": "a.png", "caption": "x"}]', "record 0.*no key `conversations`"),
    "nothing but bad": ("x.json", f"[{shown('gone/' * 999)}]".encode(), "x.json is not in LLaVA's format.*record 0"),
    "lists as lines": ("x.jsonl", LIST + b"\n" + LIST, "x.jsonl, record 0: expected an object"),
    "csv": ("x.csv", b"image,question\na.png,q\n", r"x.csv has the columns .*expected also 'answer'.*--answer-column"),
    "tsv": ("x.tsv", b"image\tquestion\n", r"x.tsv holds no rows; expected a line of column names"),
    "xml": ("x.xml", b'<!DOCTYPE x [<!ENTITY y SYSTEM "file:///etc/passwd">]><x>&y;</x>', r"files \*.xml are not read"),
    "text": ("x.txt", LINES, r"files \*.txt are not read"),
    "yaml": ("x.yaml", b"!!python/object/apply:os.system [touch executed]", r"files \*.yaml are not read"),
    "script": ("x.py", b"open('executed', 'w')", r"files \*.py are not read"),
    "pickle": ("x.pkl", pickle.dumps(Runs()), r"files \*.pkl are not read"),
    "pickle as JSON": ("x.json", pickle.dumps(Runs()), "x.json is not JSON"),
    "pickle as parquet": ("x.parquet", pickle.dumps(Runs()), "x.parquet cannot be read as a Hugging Face data set"),
    "no ending": ("x", LIST, "files without an ending are not read"),
    "zip": ("x.json.zip", b"PK\x03\x04", r"files \*.zip are not read"),
    "tar": ("x.tar.gz", PACKED, r"files \*.gz are not read"),
    "packed, cut off": ("x.jsonl.gz", PACKED[:-12], "x.jsonl.gz is cut off, damaged"),
    "packed, damaged": ("x.jsonl.gz", PACKED[:-8] + bytes(8), "x.jsonl.gz is cut off, damaged"),
    "packed, flipped": ("x.json.gz", PACKED[:12] + bytes(20) + PACKED[32:], "x.json.gz is cut off, damaged"),
    "packed, not": ("x.json.gz", LIST, "x.json.gz is cut off, damaged or not packed by gzip"),
    "packed, empty": ("x.json.gz", b"", "x.json.gz is not JSON"),
    "packed, far too well": ("x.jsonl.gz", gzip.compress(bytes(10**8), 1), "x.jsonl.gz holds over 67 MB in"),
    "parquet of text": ("x.parquet", LIST, "x.parquet cannot be read as a Hugging Face data set"),
    "parquet, empty": ("x.parquet", b"", "x.parquet"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images, a link out of the folder, one to itself, a text named as an image."""
    image_folder(tmp_path / "data", ("a.png", "sub/b.png"))
    image_folder(tmp_path / "elsewhere", ("a.png",))
    (tmp_path / "data" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop.png").symlink_to(tmp_path / "data" / "loop.png")
    (tmp_path / "data" / "text.png").write_text("no image")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time and memory of each input, and nothing run."""
    monkeypatch.chdir(tmp_path)
    with harmless(tmp_path, MEGABYTES):
        yield


def refused(capsys: pytest.CaptureFixture[str], tiny: str, data: Path | str, message: str, *more: object) -> None:
    """Status 2 and a message that fits the pattern, without a traceback, from `evaluate.py`."""
    capsys.readouterr()
    status = run_recipe("evaluate", "--checkpoint", tiny, "--data", data, "--max_new_tokens", 1, *more)
    check_refused(status, capsys.readouterr().err, message)


def check_refused(status: int, text: str, message: str) -> None:
    error = the_error(status, text)
    assert re.search(message, error, re.MULTILINE), error


def written(folder: Path, text: str | bytes, kind: str) -> Path:
    """A file of three good records, the bad one and a good one."""
    good = [json.dumps(one).encode() for one in (*GOOD, GOOD[0])]
    all_of_them = [*good[:3], text if isinstance(text, bytes) else text.encode(), good[3]]
    path = folder / f"x.{kind}"
    path.write_bytes(b"[" + b",\n".join(all_of_them) + b"]" if kind == "json" else b"\n".join(all_of_them))
    return path


@pytest.mark.parametrize("name", RECORDS)
def test_a_bad_record(name: str, folder: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In a list and in lines: refused, before training too, where nothing may be skipped; else skipped and counted."""
    text, message = RECORDS[name]
    path, lines = written(folder, text, "json"), written(folder, text, "jsonl")
    refused(capsys, tiny, path, message, "--max_skipped", 0)
    module = LlavaDataModule(str(lines), None, max_skipped=0, processor=tiny_processor())
    module.setup("fit")
    report = module.check("train")
    with pytest.raises(TooManySkippedError, match="x.jsonl: 1 of 5 records cannot be used"):
        report.require_usable(0)
    assert re.search(message, report.skipped[3], re.MULTILINE) or "answer" in message
    assert report.skipped[3].startswith("x.jsonl, record 3")
    command = ("--checkpoint", tiny, "--data", lines, "--max_new_tokens", 1, "--max_skipped", 1)
    assert run_recipe("evaluate", *command) == 0
    assert "skipped records: 1\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(name: str, folder: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, message = FILES[name]
    (folder / file).write_bytes(content)
    refused(capsys, tiny, folder / file, message)


def rows(folder: Path, bad: dict[str, Any]) -> Path:
    """A parquet file of three good rows and another."""
    content = [{"type": "image", "text": None, "index": 0.0}, {"type": "text", "text": "q", "index": None}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [content[1]]}]
    image = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    good = {"id": "good", "messages": messages, "images": [image], "type": b"x"}
    table = pyarrow.Table.from_pylist([good, good, good, {**good, "id": "bad", **bad}])
    names = [name if name != "type" else "raw" for name in table.column_names]
    pyarrow.parquet.write_table(table.rename_columns(names), folder / "x.parquet")
    return folder / "x.parquet"


def asking(index: Any = 0.0, text: Any = "q", role: Any = "user", kind: Any = "image") -> dict[str, Any]:
    parts = [{"type": kind, "text": None, "index": index}, {"type": "text", "text": text, "index": None}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a", "index": None}]}
    return {"messages": [{"role": role, "content": parts}, answer]}


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "index -1": (asking(-1.0), "`index` of an image is -1.0; expected a number from 0 on"),
    "index 0.5": (asking(0.5), "`index` of an image is 0.5; expected a number from 0 on"),
    "index NaN": (asking(float("nan")), "`index` of an image is nan"),
    "index infinite": (asking(float("inf")), "`index` of an image is inf"),
    "index 7": (asking(7.0), "a turn shows image 7, but there are 1 in `images`"),
    "index 1e300": (asking(1e300), "a turn shows image 1"),
    "text null": (asking(text=None), "expected parts of type text or image"),
    "role null": (asking(role=None), "`role` is None; expected one of"),
    "role nobody": (asking(role="tool"), "`role` is 'tool'; expected one of"),
    "type null": (asking(kind=None), "expected parts of type text or image"),
    "messages null": ({"messages": None}, "`messages` is NoneType"),
    "no messages": ({"messages": []}, "no question|no turn shows"),
    "no images": ({"images": None}, "a turn shows image 0, but there are 0"),
    "image null": ({"images": [None]}, "an image is NoneType"),
    "image of nothing": ({"images": [{"bytes": None, "path": None}]}, "an image is dict"),
    "image of text": ({"images": [{"bytes": b"text", "path": None}]}, "is not an image file"),
    "image outside": ({"images": [{"bytes": None, "path": "/etc/passwd"}]}, "leaves the image folder"),
    "image NUL": (
        {"images": [{"bytes": None, "path": "a\0.png"}]},
        r"x.parquet, row 3 \(id 'bad'\): the image path is 'a\\x00.png'",
    ),
    "image in base64": ({"images": [{"bytes": None, "path": "A" * 5000}]}, "the image path has 5000 characters"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row(name: str, folder: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    bad, message = ROWS[name]
    path = rows(folder, bad)
    refused(capsys, tiny, path, message, "--max_skipped", 0)
    command = ("--checkpoint", tiny, "--data", path, "--max_new_tokens", 1, "--max_skipped", 1)
    assert run_recipe("evaluate", *command) == 0
    assert "skipped records: 1\n" in capsys.readouterr().out


def test_text_that_is_not_utf_8_in_a_row(folder: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Which Arrow does not look at."""
    path = rows(folder, asking(text="qqqq"))
    path.write_bytes(path.read_bytes().replace(b"qqqq", b"q\xff\xfeq"))
    refused(capsys, tiny, path, "row 3: 'utf-8' codec can't decode", "--max_skipped", 0)


def script(folder: Path) -> None:
    (folder / f"{folder.name}.py").write_text("open('executed', 'w')")
    (folder / "train.jsonl").write_bytes(LINES)


FOLDERS: dict[str, tuple[Any, str]] = {
    "empty": (lambda folder: None, "cannot be read as a Hugging Face data set"),
    "script": (script, r"has a loading script, set.py; scripts of data sets are never run"),
    "script alone": (lambda f: (f / "set.py").write_text("open('executed', 'w')"), "has a loading script"),
    "other columns": (lambda f: (f / "test.csv").write_text("a,b\n1,2\n"), r"has the columns \['a', 'b'\]"),
    "broken Arrow": (lambda f: (f / "train.arrow").write_bytes(b"ARROW1" + bytes(9)), "cannot be read as"),
    "broken list": (lambda f: (f / "dataset_dict.json").write_text('{"splits": ["train"]}'), "cannot be read as|set"),
    "list of splits that is none": (lambda f: (f / "dataset_dict.json").write_text("[]"), "cannot be read as"),
    "broken state": (lambda f: (f / "state.json").write_text("{"), "cannot be read as"),
    "pickle": (lambda f: (f / "train.pkl").write_bytes(pickle.dumps(Runs())), "cannot be read as"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_folder(name: str, tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = FOLDERS[name]
    (tmp_path / "set").mkdir()
    make(tmp_path / "set")
    refused(capsys, tiny, tmp_path / "set", message)


def test_what_is_no_file(folder: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe is not waited for; a folder named as a file is a folder."""
    os.mkfifo(folder / "pipe.jsonl")
    refused(capsys, tiny, folder / "pipe.jsonl", "data file .*pipe.jsonl is not a file")
    (folder / "loop.json").symlink_to(folder / "loop.json")
    refused(capsys, tiny, folder / "loop.json", "loop.json does not exist")
    refused(capsys, tiny, folder / "gone.json.gz", "gone.json.gz does not exist")
    refused(capsys, tiny, folder / ("a" * 300 + ".json"), "File name too long|does not exist")
    refused(capsys, tiny, "x\0.json", "x.*.json")
    path = written(folder, record(), "json")
    refused(capsys, tiny, path, "image_folder .*gone does not exist", "--image_folder", folder / "gone")
    refused(capsys, tiny, path, "image_folder .*x.json does not exist or is no folder", "--image_folder", path)


GOOD_FILES = {
    "x.JSON": LIST,
    "x.ndjson": LINES,
    "x.JSONL": LINES,
    "x.json.gz": gzip.compress(LIST),
    "x.jsonl.gz": PACKED,
    "x.NDJSON.GZ": PACKED,
    "bom.json": b"\xef\xbb\xbf" + LIST,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n\r\n"),
    "crlf.json": LIST.replace(b'}, {"id', b'}\r\n,\t{"id') + b"\r\n",
    "no end.jsonl": LINES[:-1],
    "two members.jsonl.gz": gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_files_that_look_odd_and_are_fine(name: str, folder: Path) -> None:
    (folder / name).write_bytes(GOOD_FILES[name])
    source = open_source(folder / name)
    assert isinstance(source, LlavaFile) and [source[n].id for n in range(len(source))] == ["0", "1", "2"]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[2] == source[2] and copy.length_hint(2) == (10, 1)


def test_links_are_followed_where_the_user_says_so(folder: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(folder, shown("out/a.png"), "json")
    refused(capsys, tiny, path, "leaves the image folder .*follow_links: true", "--max_skipped", 0)
    command = ("--checkpoint", tiny, "--data", path, "--max_new_tokens", 1, "--max_skipped", 0)
    assert run_recipe("evaluate", *command, "--follow_links", "true") == 0
    module = LlavaDataModule(str(path), None, follow_links=True)
    source = module.source("train")
    assert isinstance(source, LlavaFile) and source[3].images == (folder / "out" / "a.png",)
    for name in ("../elsewhere/a.png", "out/../../elsewhere/a.png", str(folder.parent / "elsewhere" / "a.png")):
        data = written(folder, shown(name), "json")
        refused(capsys, tiny, data, "leaves the image folder", "--follow_links", "true", "--max_skipped", 0)


def test_workers_say_it_in_one_line(folder: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An image that is broken behind its header is found by a worker, in training."""
    whole = (folder / "sub" / "b.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    path = written(folder, shown("cut.png"), "jsonl")
    data = ["--data.train", str(path), "--data.validation", "null", "--data.max_skipped", "0", "--data.num_workers"]
    more = ["--trainer.accelerator", "cpu", "--evaluation.before", "false", "--evaluation.after", "false"]
    status = finetune("--model.path", tiny, *data, "1", "--output", str(folder.parent / "run"), *more)
    check_refused(status, capsys.readouterr().err, "1 records cannot be used, .*cut.png")


LIMITED: dict[str, tuple[str, Any, str]] = {
    "packed 4 GB": ("x.json.gz", lambda: gzip.compress(b" " * 2**26, 9) * 64, "x.json.gz holds over"),
    "a line of 300 MB": ("x.jsonl", lambda: b'{"id": "' + b"x" * (300 * 10**6) + b'"}', "x.jsonl, record 0: 300 MB"),
}


@pytest.mark.parametrize("name", LIMITED)
def test_a_process_of_its_own_in_little_memory(name: str, folder: Path) -> None:
    file, made, message = LIMITED[name]
    (folder / file).write_bytes(made())
    run = partial(run_recipe, "evaluate", "--data", folder / file)
    check_refused(*in_little_memory(run, 4, folder / "log"), message)
