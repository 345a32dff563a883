"""Texts to tokens as transformers has them, whatever is saved with the tokenizer and however long the text is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from runtime.inputs import text_encoder
from runtime.inputs.text_encoder import AUTO, NONE, Near, TextEncoder, even_spans, load_encoder, seam
from tokenizers_made import KINDS, WORDS, gpt2, llama3, unigram, write_tokenizer

TEXT = (WORDS * 3 + "</s> inside <s>\n\n") * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tokenizers")
    return {name: write_tokenizer(base / name, make()) for name, make in KINDS.items()}


def document(loaded: TextEncoder, text: str) -> list[int]:
    """Tokens of a document as a worker composes them."""
    return [*loaded.opening(), *loaded.long_tokens(text + loaded.end_text)[0].tolist(), *loaded.closing()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved", ["nothing", "truncation", "padding", "left padding", "padding to a multiple", "both"])
def test_tokens_are_those_of_transformers(kind: str, saved: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    if saved in {"truncation", "both"}:
        tokenizer.enable_truncation(16, stride=2, direction="left" if saved == "both" else "right")
    if saved in {"padding", "both"}:
        tokenizer.enable_padding(length=4096)
    elif saved != "nothing" and saved != "truncation":
        tokenizer.enable_padding(direction="left" if "left" in saved else "right", pad_to_multiple_of=1024)
    folder = write_tokenizer(tmp_path / "saved", tokenizer)
    expected = PreTrainedTokenizerFast.from_pretrained(folder)(TEXT)["input_ids"]
    loaded, told = load_encoder(folder, NONE)
    assert document(loaded, TEXT) == expected
    assert told["saved"] == {"nothing": [], "truncation": ["truncation"], "both": ["truncation", "padding"]}.get(
        saved, ["padding"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_long_text_has_the_tokens_of_the_whole(kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "PIECE_BYTES", 4096)
    monkeypatch.setattr(text_encoder, "CONTEXT_BYTES", 1024)
    monkeypatch.setattr(text_encoder, "AGREEMENT", 64)
    loaded, _ = load_encoder(folders[kind], NONE)
    text = "".join(WORDS[start:] for start in range(0, 400, 7))
    found, rough = loaded.long_tokens(text)
    assert rough == 0
    assert found.tolist() == loaded.tokenizer.encode(text, add_special_tokens=False).ids


PARTS = st.sampled_from(
    ["a", "the ", "\n", "\n\n", "  ", "é", "e\u0301", "模", "😀", "\r\n", "1234567", "<s>", "'s", "=====", "\t"]
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(KINDS)), st.lists(PARTS, min_size=60, max_size=400))
def test_any_text_has_the_tokens_of_the_whole_or_says_so(folders: dict[str, Path], kind: str, parts: list[str]) -> None:
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoder, "PIECE_BYTES", 512)
        patch.setattr(text_encoder, "CONTEXT_BYTES", 256)
        patch.setattr(text_encoder, "AGREEMENT", 24)
        loaded, _ = load_encoder(folders[kind], NONE)
        found, rough = loaded.long_tokens(text)
    if not rough:
        assert found.tolist() == loaded.tokenizer.encode(text, add_special_tokens=False).ids


def test_cut_that_cannot_be_clean_is_counted_and_loses_nothing(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single run of one letter: where its tokens lie depends on where it begins."""
    monkeypatch.setattr(text_encoder, "PIECE_BYTES", 4 * 1001)
    monkeypatch.setattr(text_encoder, "CONTEXT_BYTES", 4 * 301)
    monkeypatch.setattr(text_encoder, "AGREEMENT", 100)
    loaded, _ = load_encoder(folders["gpt2"], NONE)
    text = "=" * 5000
    found, rough = loaded.long_tokens(text)
    assert rough > 0
    assert loaded.tokenizer.decode(found.tolist()) == text


def test_seam_is_where_both_agree() -> None:
    assert seam(Near(7, [[-2, 0, 5], [0, 3, 6]]), Near(2, [[-2, 0, 5], [0, 3, 6]])) == (8, 3)
    assert seam(Near(7, [[-2, 1, 5], [1, 3, 6]]), Near(2, [[-2, 1, 5], [1, 3, 6]])) == (8, 3)
    assert seam(Near(7, [[-2, 0, 5]]), Near(2, [[-2, 0, 5]])) == (8, 3)
    assert seam(Near(7, [[-2, 0, 5], [0, 3, 6]]), Near(2, [[-2, 0, 5], [0, 2, 6]])) is None
    assert seam(Near(7, []), Near(2, [])) is None


@given(st.integers(0, 500), st.integers(4, 60))
def test_pieces_cover_a_text_and_none_is_short(size: int, piece: int) -> None:
    spans = even_spans(size, piece)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == size
    assert all(piece // 4 < end - start <= piece + piece // 4 for start, end in spans[1:])


def test_documents_end_with_the_token_that_the_tokenizer_names(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "named", llama3(), eos_token="</s>")
    loaded, told = load_encoder(folder, AUTO)
    assert document(loaded, "the unit")[0] == 0
    assert document(loaded, "the unit")[-1] == 1
    assert (told["opening"], told["closing"], told["separator"]) == (["<s>"], ["</s>"], False)
    as_dict = write_tokenizer(tmp_path / "dict", gpt2(), eos_token={"content": "</s>", "__type": "AddedToken"})
    assert load_encoder(as_dict, AUTO)[1]["closing"] == ["</s>"]
    assert load_encoder(as_dict, NONE)[1]["closing"] == []
    assert load_encoder(as_dict, "<s>")[1]["closing"] == ["<s>"]
    for end in (AUTO, NONE):
        loaded, told = load_encoder(write_tokenizer(tmp_path / "unnamed", gpt2()), end)
        assert told["separator"] is (end == AUTO)
        assert loaded.end_text == ("\n\n" if end == AUTO else "")


def test_end_that_the_tokenizer_puts_itself_is_not_put_twice(tmp_path: Path) -> None:
    loaded, told = load_encoder(write_tokenizer(tmp_path, unigram(), eos_token="</s>"), AUTO)
    assert told["closing"] == ["</s>"]
    assert document(loaded, "the unit").count(loaded.tokenizer.token_to_id("</s>")) == 1


def test_end_of_the_older_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    folder = write_tokenizer(tmp_path, gpt2(), eos_token="<s>")
    assert load_encoder(folder, AUTO)[1]["closing"] == [PreTrainedTokenizerFast.from_pretrained(folder).eos_token] == ["</s>"]
    write_tokenizer(folder, gpt2(), eos_token="<s>", added_tokens_decoder={"0": {"content": "<s>", "special": True}})
    assert load_encoder(folder, AUTO)[1]["closing"] == [PreTrainedTokenizerFast.from_pretrained(folder).eos_token] == ["<s>"]


def test_tokens_that_only_the_config_adds_are_tokens(tmp_path: Path) -> None:
    size = gpt2().get_vocab_size()
    added = {str(size): {"content": "<|end|>", "special": True}, "1": {"content": "</s>", "special": True}}
    folder = write_tokenizer(tmp_path, gpt2(), eos_token="<|end|>", added_tokens_decoder=added)
    loaded, told = load_encoder(folder, AUTO)
    assert told["closing"] == ["<|end|>"]
    text = "one <|end|> two"
    assert loaded.tokens(text).tolist() == PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"]
    write_tokenizer(tmp_path, gpt2(), added_tokens_decoder={str(size + 5): {"content": "<|end|>"}})
    with pytest.raises(ValueError, match=f"gives '<|end|>' the number {size + 5}".replace("|", r"\|")):
        load_encoder(folder, AUTO)


AROUND = [{}, *({"add_bos_token": bos, "add_eos_token": eos} for bos in (True, False) for eos in (True, False))]
AROUND += [{"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": None}]


@pytest.mark.parametrize("around", AROUND, ids=json.dumps)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_around_a_text_does_not_depend_on_the_config(kind: str, around: dict[str, bool], tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    named = {name: token for name, token in names.items() if tokenizer.token_to_id(token) is not None}
    folder = write_tokenizer(tmp_path, tokenizer, **around, **named)
    expected = PreTrainedTokenizerFast.from_pretrained(folder)(TEXT)["input_ids"]
    assert document(load_encoder(folder, NONE)[0], TEXT) == expected


@pytest.mark.parametrize("name", ["eos_token", "pad_token", "mask_token"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_the_config_names_is_found_in_a_text(kind: str, name: str, tmp_path: Path) -> None:
    """Though it is an ordinary one by tokenizer.json."""
    tokenizer = KINDS[kind]()
    word = next(word for word in ("the", "▁the", "es", "s") if tokenizer.token_to_id(word) is not None)
    folder = write_tokenizer(tmp_path, tokenizer, **{name: word})
    text = f"{WORDS} one {word} two{word}three"
    expected = PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"]
    assert document(load_encoder(folder, NONE)[0], text) == expected


@pytest.mark.parametrize("flags", [{}, {"special": True}, {"special": False}, {"normalized": False}, {"lstrip": True}], ids=str)
def test_flags_of_added_tokens_are_as_transformers_has_them(flags: dict[str, bool], tmp_path: Path) -> None:
    tokenizer = KINDS["wordpiece"]()
    added = {str(tokenizer.get_vocab_size()): {"content": "<Tool>", **flags}}
    folder = write_tokenizer(tmp_path, tokenizer, added_tokens_decoder=added)
    text = "one <Tool> two <tool> three"
    assert document(load_encoder(folder, NONE)[0], text) == PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"]


def test_a_pipe_beside_a_tokenizer_is_not_waited_for(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, gpt2())
    os.mkfifo(tmp_path / "tokenizer_config.json")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: is not a file"):
        load_encoder(tmp_path, AUTO)


def test_end_that_is_no_token_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, gpt2(), eos_token="<|eot|>")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: the end-of-text token '<\|eot\|>' is not in"):
        load_encoder(folder, AUTO)
    with pytest.raises(ValueError, match="--document-end: the end-of-text token 'x y z'"):
        load_encoder(folder, "x y z")


def test_special_tokens_written_in_a_text_are_those_tokens(tmp_path: Path) -> None:
    tokenizer = gpt2()
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True)])
    folder = write_tokenizer(tmp_path, tokenizer)
    text = "one </s> two <tool> three"
    expected = PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"]
    assert load_encoder(folder, NONE)[0].tokens(text).tolist() == expected
    assert 1 in expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer.json", b"\xff", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer.*lfs pull"),
        ("tokenizer_config.json", b"[1]", r"tokenizer_config\.json: must be a JSON object"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json: not valid JSON"),
        ("tokenizer_config.json", b"[" * 100_000, r"tokenizer_config\.json: not valid JSON"),
        ("tokenizer_config.json", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("special_tokens_map.json", b"null", r"special_tokens_map\.json: must be a JSON object"),
    ],
)  # fmt: skip
def test_broken_files_of_a_tokenizer_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_tokenizer(tmp_path, gpt2())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(tmp_path, AUTO)
    assert "\n" not in str(caught.value)


def test_no_text_is_no_token(folders: dict[str, Path]) -> None:
    loaded, _ = load_encoder(folders["llama3"], NONE)
    assert loaded.tokens("").dtype == np.uint32
    assert document(loaded, "") == [0]
