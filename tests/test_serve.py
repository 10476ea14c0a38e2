"""`recipes/serve.py`: what a request may say and show, answers in batches; by the `openai` client where it is there."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from data_examples import encode_prompt
from evaluation_toys import image
from recipes_cli import run_recipe
from tiny import tiny_llava, tiny_processor

from himap_train import PruningSchedule, PruningStage, install_pruning, record_pruning
from himap_train.analysis.answered import prompt_encoder
from himap_train.checkpoints.load import load_with_schedule
from himap_train.data.batches import collate
from himap_train.data.records import Conversation, Turn
from himap_train.data.scene_questions import SceneQuestions
from himap_train.evaluation.answering import answer_batch
from himap_train.evaluation.lmms_eval.requests import Answering
from himap_train.serving import app as app_module
from himap_train.serving import batches as batches_module
from himap_train.serving import requests
from himap_train.serving.batches import Answer, Batches
from himap_train.serving.requests import Asked, Reader, UnknownModelError, image_of

SCHEDULE = PruningSchedule((PruningStage(2, "instruction", 0.5), PruningStage(4, "image", 0.125)))
GREEDY = {"do_sample": False}
needs_server = [
    pytest.mark.serve,
    pytest.mark.skipif(not all(map(find_spec, ("openai", "uvicorn", "starlette"))), reason="needs starlette, openai"),
]


def data_url(picture):
    stored = io.BytesIO()
    picture.save(stored, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()}"


def user(*parts, role="user"):
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": part}
        for part in parts
    ]
    return {"role": role, "content": content}


SHOWN = {"url": data_url(image(0)), "detail": "low"}


@pytest.fixture(scope="module")
def model():
    return install_pruning(tiny_llava(), SCHEDULE)


@pytest.fixture(scope="module")
def reader(model):
    return Reader("tiny", prompt_encoder(model, tiny_processor()), 64)


# ---- what is asked ----


def test_a_request_is_the_prompt_of_the_same_conversation(reader):
    messages = [
        {"role": "developer", "content": "Be short."}, user(SHOWN, "What is this?"),
        {"role": "assistant", "content": "A dog"}, user("And this?", {"url": data_url(image(1))}),
    ]  # fmt: skip
    asked = reader({"model": "tiny", "messages": messages, "n": 1, "stop": None, "seed": 3, "user": "me"})
    turns = (
        ("system", "Be short."),
        ("user", "<image>What is this?"),
        ("assistant", "A dog"),
        ("user", "And this?<image>"),
    )
    same = Conversation("same", (image(0), image(1)), tuple(Turn(*turn) for turn in turns))
    expected = encode_prompt(same, tiny_processor())
    assert torch.equal(asked.sample["input_ids"], expected["input_ids"])
    for found, wanted in zip(asked.sample["images"], expected["images"], strict=True):
        assert torch.equal(found["pixel_values"], wanted["pixel_values"])
    assert asked.answering == Answering(64, GREEDY, ()) and asked.seed == 3


def test_options_of_an_answer(reader):
    def answering(**options):
        return reader({"messages": [user("Hi")], **options}).answering

    sampled = {"do_sample": True, "temperature": 0.5, "top_p": 1.0, "top_k": 0, "min_p": None, "typical_p": 1.0}
    sampled |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    assert answering(max_tokens=7, stop="end") == Answering(7, GREEDY, ("end",))
    assert answering(max_tokens=7, max_completion_tokens=9, temperature=0.5) == Answering(9, sampled, ())
    assert answering(temperature=0.5, top_p=0.9).search == sampled | {"top_p": 0.9}
    assert answering(temperature=0.5, top_p=0).search == sampled | {"top_p": 1e-6}
    harmless = {"modalities": ["text"], "top_logprobs": 0, "parallel_tool_calls": True}
    assert answering(**harmless) == answering()
    assert answering(temperature=0, top_p=0.9).search == answering(temperature=1e-300).search == GREEDY
    prompt = len(reader({"messages": [user("Hi")]}).sample["input_ids"])
    assert answering(max_tokens=10_000).max_new_tokens == 512 - prompt  # what the context has room for


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "no JSON object"),
        ({}, "'messages' is missing"),
        ({"messages": ["Hi"]}, r"messages\[0\]: expected the keys `role` and `content`, found str 'Hi'"),
        ({"messages": [user("Hi", role=[])]}, r"`role` is \[\]; expected one of"),
        ({"messages": [user("Hi", role="tool")]}, "`role` is 'tool'; expected one of"),
        ({"messages": [user("Hi"), {"role": "assistant", "content": "Hello"}]}, "the last message is not the user's"),
        ({"messages": [user("Hi"), user("Hi")]}, "must alternate"),
        ({"messages": [{"role": "user", "content": 3}]}, "`content` is int 3; expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "expected parts of type text"),
        ({"messages": [user("Hi \ud83d")]}, "half a character"),
        ({"messages": [user("Hi")], "temprature": 1}, "unknown key 'temprature'; did you mean 'temperature'"),
        ({"messages": [user("Hi")], "n": 2}, "'n' can only be 1"),
        ({"messages": [user("Hi")], "tools": [{}]}, "'tools' can only be"),
        ({"messages": [user("Hi")], "temperature": -1}, "'temperature' is -1; expected float from 0 to 100"),
        ({"messages": [user("Hi")], "temperature": float("nan")}, "'temperature' is nan"),
        ({"messages": [user("Hi")], "temperature": 1, "top_p": -1}, "'top_p' is -1"),
        ({"messages": [user("Hi")], "max_tokens": 0}, "'max_tokens' is 0; expected int from 1"),
        ({"messages": [user("Hi")], "max_tokens": True}, "'max_tokens' is True"),
        ({"messages": [user("Hi")], "stop": [""]}, "'stop' is"),
        ({"messages": [user("Hi " * 600)]}, r"takes 18\d+ tokens.* max_length is 511, the model's context less one"),
        ({"messages": [{**user("Hi"), "images": ["aGk="]}]}, r"messages\[0\] has the unknown key 'images'"),
        ({"messages": [user("Hi")], "stream": "false"}, "'stream' is 'false'; expected true or false"),
        ({"messages": [user("Hi")], "stream_options": 5}, "'stream_options' is 5; expected an object"),
        ({"messages": [user({"url": data_url(image(0))}, "<image> what?")]}, "2 <image> in the conversation but 1"),
        ({"messages": [user({"url": "data:image/png;base64,bm8gcGljdHVyZQ=="})]}, "is not an image file"),
        ({"messages": [user({"url": "data:image/png;base64,???"})]}, r"messages\[0\]: .*base64"),
        ({"messages": [user({"url": "data:image/png,abc"})]}, "is not base64"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(reader, body, message):
    with pytest.raises(ValueError, match=message):
        reader(body)


def test_another_model_is_not_found(reader):
    with pytest.raises(UnknownModelError, match="'gpt-4o' is not served here; 'tiny' is"):
        reader({"model": "gpt-4o", "messages": [user("Hi")]})


# ---- what is shown ----


@pytest.fixture
def site():
    """An HTTP server of this machine: `/image`, `/away` leads elsewhere, everything else is not there."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            known = {"/image?x=1": 200, "/%C3%A4%20b%20c.png?x=%C3%A4": 200, "/?x=1": 200, "/away": 302}
            self.send_response(known.get(self.path, 404))
            self.send_header("Location", "http://169.254.169.254/secret")
            self.end_headers()
            self.wfile.write(b"bytes of an image")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_are_read_from_an_allowed_folder_alone(tmp_path):
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown/a b.png").write_bytes(b"")
    inside, outside = f"file://{tmp_path}/shown/a%20b.png", f"file://{tmp_path}/shown/../secret.png"
    with pytest.raises(ValueError, match="here: files are refused; .*--image-folder"):
        image_of(inside, "here")
    assert image_of(inside, "here", tmp_path / "shown") == tmp_path / "shown/a b.png"
    (tmp_path / "shown/link").symlink_to("/proc/self/cwd")
    for url in (outside, f"file://{tmp_path}/shown/link"):  # not a word of where it leads
        with pytest.raises(ValueError, match=r"^here: 'file://.*' is not in the folder that this server reads$"):
            image_of(url, "here", tmp_path / "shown")


def test_private_addresses_are_not_asked_unless_allowed(site):
    with pytest.raises(ValueError, match="127.0.0.1 has no public address"):
        image_of(f"{site}/image?x=1", "here")
    for page in ("/image?x=1", "/ä b%20c.png?x=ä", "?x=1"):
        assert image_of(f"{site}{page}", "here", private=True) == b"bytes of an image"
    with pytest.raises(ValueError, match="answered 302: ask for http://169"):
        image_of(f"{site}/away", "here", private=True)
    with pytest.raises(ValueError, match="answered 404"):
        image_of(f"{site}/nothing", "here", private=True)


@pytest.mark.parametrize(
    "host",
    ["localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "10.1.2.3", "169.254.169.254", "0x7f.1", "[fd00::1]"],
)
def test_no_spelling_of_a_private_address_is_asked(host, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ValueError, match="has no public address|not known|not supported|resolution"):
        image_of(f"http://{host}/image", "here")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_site_that_sends_byte_by_byte_is_left_in_time(scheme, tmp_path, monkeypatch):
    """Each byte comes in time, the whole does not: within the headers, where nothing is read that could be counted."""
    serving, asking = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    if scheme == "https":
        if shutil.which("openssl") is None:
            pytest.skip("openssl makes the certificate")
        new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -days 1"
        subprocess.run([*new.split(), "-keyout", "key", "-out", "cert"], cwd=tmp_path, check=True, capture_output=True)
        serving.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    asking.check_hostname, asking.verify_mode = False, ssl.CERT_NONE

    def dribble(server):
        client, _ = server.accept()
        client = serving.wrap_socket(client, server_side=True) if scheme == "https" else client
        with client, contextlib.suppress(OSError):
            client.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            for _ in range(50):
                time.sleep(0.1)
                client.sendall(b"a")

    monkeypatch.setattr(requests, "_SECONDS", 0.8)
    monkeypatch.setattr(ssl, "create_default_context", lambda: asking)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=dribble, args=(server,), daemon=True).start()
        begun = time.monotonic()
        with pytest.raises(ValueError, match=r"or 0\.8 s; send it as a data: URL"):
            image_of(f"{scheme}://127.0.0.1:{server.getsockname()[1]}/a", "here", private=True)
        assert time.monotonic() - begun < 4


@pytest.mark.parametrize("url", ["ftp://example.com/a", "/etc/passwd", "http://", "http://[::1", "http://a:99999/"])
def test_other_urls_are_refused(url):
    with pytest.raises(ValueError, match="^here: "):
        image_of(url, "here")


# ---- answers ----


class Words:
    """A tokenizer of a few words."""

    added_tokens_decoder: dict = {}
    words = (" Hello", " wor", "ld", "\n", "END", "E", "\ufffd", "é", "</s>")

    def decode(self, ids, skip_special_tokens):
        text = "".join(self.words[token] for token in ids if token != 8)
        return text.replace("\ufffdé", "é")


def told(tokens, until=(), most=20):
    """Pieces of an answer, how it ended and how many tokens it took."""

    async def run():
        asked = Asked({}, Answering(most, GREEDY, until), None)
        answer = Answer(asked, Words(), [8])
        for token in tokens:
            answer.take(token)
        return [piece async for piece in answer], answer.finish, len(answer.tokens)

    return asyncio.run(run())


def test_pieces_are_sent_when_they_are_certain():
    assert told([0, 1, 2, 3, 8, 0]) == (["Hello", " wor", "ld"], "stop", 5)
    assert told([0, 1, 2, 0], most=3) == (["Hello", " wor", "ld"], "length", 3)
    assert told([0, 3, 4, 2], until=("END",)) == (["Hello"], "stop", 3)
    assert told([0, 5, 1, 8], until=("END",)) == (["Hello", "E wor"], "stop", 4)  # E might have become END
    assert told([0, 1, 2, 8], until=("lo wo",)) == (["Hel"], "stop", 2)
    assert told([0, 6, 7, 8]) == (["Hello", "é"], "stop", 4)
    assert told([3, 8]) == ([], "stop", 2)


def test_a_generation_that_ends_by_itself_ends_its_answers(embedded, monkeypatch):
    """A `max_time` in the checkpoint's generation config: nobody else would."""
    model, processor, samples = embedded
    monkeypatch.setattr(model.generation_config, "max_time", 1e-9)

    async def run():
        answer = Batches(model, processor, 4).ask(Asked(samples[0], Answering(20, GREEDY, ()), None))
        pieces = [piece async for piece in answer]
        return "".join(pieces), answer

    text, answer = asyncio.run(asyncio.wait_for(run(), 30))
    assert answer.finish == "length" and len(answer.tokens) < 20
    assert text == processor.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()


def test_nobody_listening_ends_an_answer():
    async def run():
        answer = Answer(Asked({}, Answering(20, GREEDY, ()), None), Words(), [8])
        answer.take(0)
        pieces = aiter(answer)
        assert await anext(pieces) == "Hello"
        await pieces.aclose()
        answer.take(1)
        return answer.finish, len(answer.tokens)

    assert asyncio.run(run()) == ("gone", 1)


@pytest.fixture(scope="module")
def embedded():
    model, processor = load_with_schedule("embedded", "himap")
    source = SceneQuestions("test", scenes=6)
    encoder = prompt_encoder(model, processor)
    return model, processor, [encoder.encode_prompt(source[number]) for number in range(6)]


def ask(served, *requests, answer=answer_batch):
    """The texts of requests that arrive together, and the size of each batch that was run."""
    sizes = []

    def counted(model, processor, batch, *rest):
        sizes.append(len(batch["ids"]))
        return answer(model, processor, batch, *rest)

    async def text(answer):
        try:
            return "".join([piece async for piece in answer])
        except RuntimeError as error:
            return error

    async def run():
        answers = [
            served.ask(Asked(sample, Answering(length, search, ()), seed)) for sample, length, search, seed in requests
        ]
        return await asyncio.gather(*map(text, answers))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "answer_batch", counted)
        return asyncio.run(run()), sizes


def test_what_arrives_together_is_answered_together_and_pruned(embedded):
    model, processor, samples = embedded
    expected = [answer_batch(model, processor, collate([one], 0, padding_side="left"), 16)[0][0] for one in samples]
    with record_pruning(model) as trace:
        found, sizes = ask(Batches(model, processor, 4), *[(one, 16, GREEDY, None) for one in samples])
    assert found == expected and sizes == [4, 2] and len(set(found)) > 3
    ids = collate(samples[4:], 0, padding_side="left")["input_ids"]
    images = [
        [int((row[kept] == processor.image_token_id).sum()) for row, kept in zip(ids, stage, strict=True)]
        for stage in trace.kept
    ]
    assert images == [[72, 72], [18, 18]]


def test_batches_sample_alike_and_lengths_are_each_ones_own(embedded):
    model, processor, samples = embedded
    served, warm = Batches(model, processor, 8), {"do_sample": True, "temperature": 5.0, "top_p": 1.0, "top_k": 0}
    texts, sizes = ask(
        served, (samples[1], 16, GREEDY, None), (samples[1], 1, GREEDY, None), (samples[0], 9, warm, None),
        (samples[0], 9, warm, 1), (samples[0], 9, warm, 1), (samples[0], 9, warm, 2),
    )  # fmt: skip
    assert sizes == [2, 1, 1, 1, 1]
    assert texts[0] == "top center" and texts[1] and texts[0].startswith(texts[1]) and texts[0] != texts[1]
    assert texts[3] == texts[4] and len({texts[2], texts[3], texts[5]}) == 3


def test_one_that_breaks_the_model_leaves_the_others_their_answers(embedded):
    model, processor, samples = embedded
    broken = samples[0] | {"images": [{"pixel_values": torch.zeros(1, 3, 7, 7)}]}
    served = Batches(model, processor, 4)
    texts, sizes = ask(served, (samples[1], 16, GREEDY, None), (broken, 16, GREEDY, None))
    assert texts[0] == "top center" and isinstance(texts[1], RuntimeError) and "no answer: " in str(texts[1])
    assert ask(served, (samples[1], 16, GREEDY, None))[0] == ["top center"]


def test_a_batch_without_memory_is_freed_before_its_requests_are_tried_alone(embedded):
    class Large:
        pass

    held, found = [], []

    def full(model, processor, batch, most, search):
        found.append([reference() is not None for reference in held])
        large = Large()
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no room")

    model, processor, samples = embedded
    ask(Batches(model, processor, 4), (samples[0], 4, GREEDY, None), (samples[1], 4, GREEDY, None), answer=full)
    assert found[:2] == [[], [False]] and len(found) == 3


def test_who_leaves_while_waiting_is_not_answered(embedded, monkeypatch):
    model, processor, samples = embedded
    answered = []
    busy = threading.Event()

    def slow(model, processor, batch, most, search):
        busy.set()
        time.sleep(0.3)
        answered.append(len(batch["input_ids"]))

    monkeypatch.setattr(batches_module, "answer_batch", slow)

    class Left:
        async def receive(self):
            return {"type": "http.disconnect"}

    class Stays:
        async def receive(self):
            await asyncio.Event().wait()

    async def run():
        served = Batches(model, processor, 1)
        asked = [Asked(sample, Answering(4, GREEDY, ()), None) for sample in samples[:4]]
        first = asyncio.create_task(app_module._whole(served.ask(asked[0]), Stays()))
        await asyncio.to_thread(busy.wait)
        gone = [await app_module._whole(served.ask(one), Left()) for one in asked[1:3]]
        await app_module._whole(served.ask(asked[3]), Stays())
        await first
        return gone

    assert asyncio.run(run()) == ["", ""] and answered == [1, 1]


# ---- the recipe ----


def test_without_its_packages_it_says_how_to_get_them(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert run_recipe("serve") == 2
    assert 'pip install "himap-train[serve]"' in capsys.readouterr().err


def test_a_port_in_use_and_sizes_are_told_before_weights_are_read(monkeypatch, capsys):
    for name in ("starlette", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run_recipe("serve", "--port", port, "--checkpoint", "nowhere") == 2
    assert f"port {port} of 127.0.0.1 cannot be had" in capsys.readouterr().err
    assert run_recipe("serve", "--batch-size", 0) == 2 and "--batch-size 0" in capsys.readouterr().err


@pytest.fixture(scope="module")
def client():
    """OpenAI's client of the recipe as it runs, on the embedded model."""
    import openai
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "run", lambda app, **how: configs.append(uvicorn.Config(app, **how)))
        assert run_recipe("serve", "--schedule", "himap", "--port", port, "--max-new-tokens", 16) == 0
    server = uvicorn.Server(configs[0])
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.05)
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def scene(number):
    record = SceneQuestions("test", scenes=number + 1)[number]
    return [user({"url": data_url(record.images[0])}, record.turns[0].text.removeprefix("<image>\n"))]


class TestServed:
    pytestmark = needs_server

    def test_models(self, client):
        import openai

        [card] = client.models.list().data
        assert card.id == "embedded" and [stage["layer"] for stage in card.pruning["stages"]] == [1, 2]
        assert client.models.retrieve("embedded") == card
        with pytest.raises(openai.NotFoundError, match="model 'owner/other' is not served here; this is 'embedded'"):
            client.models.retrieve("owner/other")

    def test_answers_whole_and_streamed_are_those_of_evaluation(self, client, embedded):
        model, processor, samples = embedded
        for number, sample in enumerate(samples[:3]):
            (expected,), _ = answer_batch(model, processor, collate([sample], 0, padding_side="left"), 16)
            asked = {"model": "embedded", "messages": scene(number)}
            whole = client.chat.completions.create(**asked)
            assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "stop"
            assert whole.usage.prompt_tokens == len(sample["input_ids"])
            chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
            pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
            assert "".join(pieces) == expected and chunks[-2].choices[0].finish_reason == "stop"
            assert chunks[-1].usage == whole.usage
        short = client.chat.completions.create(model="embedded", messages=scene(1), max_tokens=1)
        assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 1

    def test_many_at_once(self, client, embedded):
        import openai

        model, processor, samples = embedded
        expected, _ = answer_batch(model, processor, collate(samples, 0, padding_side="left"), 16)

        async def run():
            many = openai.AsyncOpenAI(base_url=client.base_url, api_key="none", timeout=60)
            asked = [many.chat.completions.create(model="embedded", messages=scene(one)) for one in range(len(samples))]
            return [found.choices[0].message.content for found in await asyncio.gather(*asked)]

        assert asyncio.run(run()) == expected

    def test_refusals_are_openai_errors(self, client):
        import openai

        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="gpt-4o", messages=scene(0))
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model="embedded", messages=[user("card " * 3000)])
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="has no public address"):
            client.chat.completions.create(model="embedded", messages=[user({"url": f"{client.base_url}models"}, "?")])
        with pytest.raises(openai.BadRequestError, match="Expecting"):
            client.post("/chat/completions", content=b"{", cast_to=object)

    @pytest.mark.parametrize("stream", [True, False])
    def test_who_hangs_up_ends_the_answer(self, client, monkeypatch, stream):
        import openai

        taken, ended = [], threading.Event()

        def endless(model, processor, batch, most, search):
            while (
                len(taken) < 1000 and not search["stopping_criteria"](torch.tensor([[40 + len(taken) % 2]]), None).all()
            ):
                taken.append(1)
                time.sleep(0.02)
            ended.set()

        monkeypatch.setattr(batches_module, "answer_batch", endless)
        asked = {"model": "embedded", "messages": scene(0), "max_tokens": 1800}
        if stream:
            with client.chat.completions.create(**asked, stream=True) as chunks:
                assert len([chunk for chunk, _ in zip(chunks, range(5), strict=False)]) == 5
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.7, max_retries=0).chat.completions.create(**asked)
        assert ended.wait(15) and 5 <= len(taken) < 1000

    def test_an_answer_that_breaks_is_an_error_of_the_stream_and_the_server_lives(self, client, monkeypatch):
        import openai

        def breaks(*_):
            raise ArithmeticError("no luck")

        with monkeypatch.context() as patch:
            patch.setattr(batches_module, "answer_batch", breaks)
            asked = {"model": "embedded", "messages": scene(0)}
            with pytest.raises(openai.InternalServerError, match="no answer: ArithmeticError: no luck"):
                client.chat.completions.create(**asked)
            with pytest.raises(openai.APIError, match="no luck"):
                list(client.chat.completions.create(**asked, stream=True))
        assert client.chat.completions.create(**asked).choices[0].message.content
