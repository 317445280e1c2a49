"""Data: splits without overlap, packing that loses nothing, labels that cross nothing, errors that help."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from effc.compiler.losses import IGNORED
from effc.runtime.data._packed import Packed
from effc.runtime.data._vocabulary import Vocabulary
from effc.runtime.data.chat import Chat
from effc.runtime.data.choices import Choices
from effc.runtime.data.corpus import Corpus, listed_files
from effc.runtime.data.jsonl import Jsonl
from effc.runtime.data.text import Text
from effc.specs.diagnostic import EffcError
from tests.runtime.doubles import tokenizer_files

FILES = tokenizer_files()
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(30):
        body = "".join(f"line {j} of file {i}\n" for j in range(3 + i % 7))
        (tmp_path / f"{i:02}.txt").write_text(body)
    return tmp_path


def packed(folder: Path, **more: object) -> Packed:
    return Text(path=str(folder / "*.txt"), **({"seq": 32, "heldout": 0.2} | more)).open(FILES)


def texts(data: Packed, split: str) -> list[str]:
    stream = data.streams[split]
    numbers = np.unique(stream.document)
    tokenizer = Vocabulary.of(FILES).tokenizer
    return [tokenizer.decode(stream.ids[stream.document == n].tolist()) for n in numbers]


def test_every_document_is_in_one_split_whole(folder: Path) -> None:
    data = packed(folder)
    train, heldout = texts(data, "train"), texts(data, "heldout")
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(p.read_text() for p in folder.glob("*.txt"))


def test_equal_files_never_fall_on_both_sides(folder: Path) -> None:
    for i, path in enumerate(sorted(folder.glob("*.txt"))):
        (folder / f"copy{i}.txt").write_text(path.read_text())
    data = packed(folder)
    assert not set(texts(data, "train")) & set(texts(data, "heldout"))
    assert len(texts(data, "train")) + len(texts(data, "heldout")) == 30


def test_every_token_but_the_first_of_a_document_is_predicted_once(folder: Path) -> None:
    data = packed(folder)
    for split in ("train", "heldout"):
        stream = data.streams[split]
        batch = data.batch(split, range(data.size(split)))
        labelled = int((batch.labels != IGNORED).sum())
        assert labelled == len(stream.ids) - len(np.unique(stream.document)) == data.tokens(split)


def test_labels_are_the_next_token_and_never_of_another_document(folder: Path) -> None:
    data = packed(folder)
    batch = data.batch("heldout", range(data.size("heldout")))
    segments = batch.step.segments
    assert segments is not None
    inside = batch.labels[:, :-1] != IGNORED
    assert bool((batch.labels[:, :-1][inside] == batch.ids[:, 1:][inside]).all())
    assert bool((segments[:, :-1] == segments[:, 1:])[inside].all())
    fresh = segments[:, 1:] != segments[:, :-1]
    assert bool((batch.step.positions[:, 1:][fresh] == 0).all())


def test_a_further_pass_holds_the_same_tokens_at_other_cuts(folder: Path) -> None:
    data = packed(folder)
    size, total = data.size("train"), len(data.streams["train"].ids)
    first, second = data.batch("train", range(size)), data.batch("train", range(size, 2 * size))
    assert {tuple(r) for r in first.ids.tolist()}.isdisjoint(tuple(r) for r in second.ids.tolist())
    filled = size * 32 - total  # both passes end in filling, which is token 0
    assert sorted(first.ids.flatten().tolist())[filled:] == sorted(second.ids.flatten().tolist())[filled:]
    labelled = int((second.labels != IGNORED).sum())
    assert labelled in (
        data.tokens("train"),
        data.tokens("train") - 1,
    )  # the token at the new start has no past
    inside = second.labels[:, :-1] != IGNORED
    assert bool((second.labels[:, :-1][inside] == second.ids[:, 1:][inside]).all())
    again = packed(folder).batch("train", range(size, 2 * size))
    assert bool((again.ids == second.ids).all())


def test_a_row_inside_one_document_needs_no_segments(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one long text " * 200)
    (tmp_path / "b.txt").write_text("another long text " * 200)
    data = packed(tmp_path)
    assert data.batch("train", [0]).step.segments is None


def test_seed_orders_and_everything_else_names(folder: Path) -> None:
    same, again = packed(folder), packed(folder)
    assert same.fingerprint == again.fingerprint
    assert bool((same.batch("train", [0]).ids == again.batch("train", [0]).ids).all())
    prints = {packed(folder, **more).fingerprint for more in ({}, {"seed": 1}, {"seq": 16}, {"heldout": 0.3})}
    assert len(prints) == 4
    (folder / "00.txt").write_text("changed")
    assert packed(folder).fingerprint != same.fingerprint


def test_packed_data_is_read_back_from_the_store(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from effc.runtime.data import _packed

    store = tmp_path_factory.mktemp("store")
    source = Text(path=str(folder / "*.txt"), seq=32)
    first = source.open(FILES, store)
    _packed._kept.clear()
    second = source.open(FILES, store)
    assert len(list((store / "data").iterdir())) == 1
    assert bool((first.batch("train", [0, 1]).labels == second.batch("train", [0, 1]).labels).all())
    assert second.bytes_per_token == first.bytes_per_token


def test_one_file_is_cut_at_blank_lines_and_adds_up(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {i} " * 60 for i in range(40))
    (tmp_path / "book.txt").write_text(text)
    parts = Text(path=str(tmp_path / "book.txt")).documents(Vocabulary.of(FILES))
    assert len(parts) > 5
    assert "".join(p.text for p in parts) == text


def test_corpus_is_the_standard_library_without_tests() -> None:
    data = Corpus(name="python-stdlib", seq=64).open(FILES)
    assert data.streams["train"].bytes > 15 * data.streams["heldout"].bytes > 0
    paths = [path.as_posix() for path, _ in listed_files()]
    assert not [p for p in paths if "/test/" in p or "/tests/" in p]


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("gone", None, "E620", "no data is at"),
        ("empty", b" \n", "E621", "found no text"),
        ("latin", b"caf\xe9\n", "E622", "line 1: 0xe9"),
        ("short", b"only this", "E624", "at least 2"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, name: str, content: bytes | None, code: str, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EffcError, match=words) as caught:
        Text(path=str(tmp_path / name)).open(FILES)
    assert caught.value.diagnostics[0].code == code


def test_a_model_without_tokenizer_reads_no_text(folder: Path) -> None:
    for files in ({}, {"tokenizer.json": b"{}"}):
        with pytest.raises(EffcError) as caught:
            Text(path=str(folder)).open(files)
        assert caught.value.diagnostics[0].code == "E625"


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_jsonl_reads_one_field(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"body": f"text {i}", "id": i} for i in range(9)))
    assert [d.text for d in Jsonl(path=path, field="body").documents(Vocabulary.of(FILES))][:2] == [
        "text 0",
        "text 1",
    ]
    with pytest.raises(EffcError, match="it has: body, id"):
        Jsonl(path=path).open(FILES)


@pytest.mark.parametrize("row", ["{", "[1]", '{"text": 3}'])
def test_malformed_lines_are_refused_with_their_number(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + row + "\n")
    with pytest.raises(EffcError, match=r"a\.jsonl:2") as caught:
        Jsonl(path=str(tmp_path / "a.jsonl")).open(FILES)
    assert caught.value.diagnostics[0].code == "E623"


def talk(answer: str) -> dict[str, object]:
    said = [("user", "sum of 1 and 2?"), ("assistant", answer), ("user", "thanks"), ("assistant", "welcome")]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def test_chat_takes_loss_on_completions_only(tmp_path: Path) -> None:
    files = FILES | {"chat_template.jinja": TEMPLATE.encode()}
    path = lines(tmp_path / "talks.jsonl", *(talk(f"it is {i}") for i in range(9)))
    data = Chat(path=path, seq=512, heldout=0.3).open(files)
    tokenizer = Vocabulary.of(files).tokenizer
    batch = data.batch("heldout", [0])
    counted = batch.labels[0][batch.labels[0] != IGNORED]
    said = tokenizer.decode(counted.tolist())
    assert "it is" in said
    assert "welcome</assistant>" in said
    assert "sum" not in said
    assert "thanks" not in said


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "brings no chat template"),
        ("{{ ''.__class__.__mro__ }}", "cannot be used"),
        ("{% if %}", "cannot be used"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages | length }}{{ messages[-1].content }}", "reads differently on its own"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(tmp_path: Path, template: str | None, words: str) -> None:
    files = FILES if template is None else FILES | {"chat_template.jinja": template.encode()}
    with pytest.raises(EffcError, match=words) as caught:
        Chat(path=lines(tmp_path / "t.jsonl", talk("3"), talk("4"))).open(files)
    assert caught.value.diagnostics[0].code == "E626"


def test_choices_are_what_a_text_adds_to_the_prompt(tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", {"prompt": "return ", "choices": ["first", "second"], "answer": 1})
    (question,) = Choices(path=path).open(FILES).items
    tokenizer = Vocabulary.of(FILES).tokenizer
    joined = [tokenizer.decode([*question.prompt, *c]) for c in question.choices]
    assert joined == ["return first", "return second"]
    assert question.answer == 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "", "choices": ["a", "b"], "answer": 0},
        {"prompt": "p", "choices": ["a"], "answer": 0},
        {"prompt": "p", "choices": ["a", "b"], "answer": 2},
        {"prompt": "p", "choices": ["a", "b"]},
    ],
)
def test_malformed_questions_are_refused(tmp_path: Path, row: dict[str, object]) -> None:
    with pytest.raises(EffcError) as caught:
        Choices(path=lines(tmp_path / "q.jsonl", row)).open(FILES)
    assert caught.value.diagnostics[0].code == "E623"


def test_what_is_kept_may_be_damaged_or_impossible_to_write(folder: Path, tmp_path: Path) -> None:
    from effc.runtime.data import _packed

    source = Text(path=str(folder / "*.txt"), seq=32)
    store = tmp_path / "store"
    _packed._kept.clear()
    first = source.open(FILES, store).batch("train", [0])
    (kept,) = (store / "data").iterdir()
    for damage in (b"", b"\xff" * 64):
        kept.write_bytes(damage)
        _packed._kept.clear()
        assert bool((source.open(FILES, store).batch("train", [0]).ids == first.ids).all())
    _packed._kept.clear()
    (tmp_path / "file").write_text("no folder")
    assert bool((source.open(FILES, tmp_path / "file").batch("train", [0]).ids == first.ids).all())
