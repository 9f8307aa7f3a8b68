"""Tokenizers from Hugging Face directories and GGUF files: the same ids and texts as transformers gives."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, processors

from jaxserve.errors import ModelLoadError
from jaxserve.gguf_tokenizer import SPLITS
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizers import BYTES, FAMILIES, SPECIAL, backend_of, tokenizer_of

DATA = Path(__file__).parent / "data"
TEXTS = ["the lazy dog", "  isn't  it?\n\n", "12 123 你好 😀", "<s>quick</s>", "é</s></s>e", "", " ", "\x00"]

texts = st.text(st.sampled_from("the quick  dog's 12\n▁é你😀\x00<s>"), max_size=30)


# --- Hugging Face directories -------------------------------------------------------------------------------


def write_directory(directory: Path, family: str, **config: Any) -> Path:
    backend_of(family).save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
        {
            "bos_token": {"__type": "AddedToken", "content": "<s>"},
            "eos_token": "</s>",
            "add_bos_token": False,
            "add_eos_token": True,
        },
    ],
)
def test_ids_and_texts_of_a_directory_are_those_of_transformers(
    tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    from transformers import PreTrainedTokenizerFast

    write_directory(tmp_path, family, **config)
    ours, theirs = load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == {k: v for k, v in theirs.special_tokens_map.items() if isinstance(v, str)}
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    for text in TEXTS:
        for special in (False, True):
            ids = theirs(text, add_special_tokens=special).input_ids
            assert ours.encode(text, add_special_tokens=special) == ids
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(
                ids, skip_special_tokens=special
            )


def test_the_post_processor_of_the_file_adds_special_tokens(tmp_path: Path) -> None:
    write_directory(tmp_path, "byte level")
    backend = backend_of("byte level").from_str(backend_of("byte level").to_str())
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    plain = tokenizer.encode("dog", add_special_tokens=False)
    assert tokenizer.encode("dog", add_special_tokens=True) == [backend.token_to_id("<s>"), *plain]


def test_a_truncation_or_padding_left_in_the_file_has_no_effect(tmp_path: Path) -> None:
    backend = backend_of("byte level").from_str(backend_of("byte level").to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    want = tokenizer_of("byte level").encode("the lazy dog", add_special_tokens=False)
    assert load_tokenizer(tmp_path).encode("the lazy dog", add_special_tokens=False) == want


def test_a_role_that_only_the_config_knows_becomes_special(tmp_path: Path) -> None:
    write_directory(tmp_path, "WordPiece", eos_token="dog")
    tokenizer = load_tokenizer(tmp_path)
    (dog,) = tokenizer.eos_token_ids
    assert dog in tokenizer.special_token_ids
    assert tokenizer.decode([dog], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("config", "file", "want"),
    [
        ({}, None, None),
        ({"chat_template": "A"}, None, "A"),
        ({"chat_template": "A"}, "B", "B"),
        ({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}, None, "D"),
        ({"chat_template": [{"name": "rag", "template": "R"}]}, None, None),
    ],
)  # fmt: skip
def test_where_the_chat_template_is_found(
    tmp_path: Path, config: dict[str, Any], file: str | None, want: str | None
) -> None:
    write_directory(tmp_path, "byte level", **config)
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    assert load_tokenizer(tmp_path).chat_template == want


def test_roles_are_also_found_in_the_special_tokens_map(tmp_path: Path) -> None:
    write_directory(tmp_path, "byte level")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert load_tokenizer(tmp_path).special_tokens == {"eos_token": "</s>"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json cannot be read"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "tokenizer_config.json cannot be read"),
        ({"tokenizer.json": None, "tokenizer_config.json": "[]"}, "tokenizer_config.json is no JSON object"),
        ({"tokenizer.json": None, "tokenizer_config.json": "[" * 10**5}, "tokenizer_config.json cannot be read"),
    ],
)  # fmt: skip
def test_a_broken_directory_is_one_line_that_names_the_file(
    tmp_path: Path, files: dict[str, str | None], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(backend_of("byte level").to_str() if text is None else text)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


# --- Texts and bytes ----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(family=st.sampled_from(["byte level", "SentencePiece", "Unigram", "WordPiece"]), text=texts)
def test_bytes_of_tokens_are_together_the_text(family: str, text: str) -> None:
    tokenizer = tokenizer_of(family)
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids = [i for i in ids if i not in tokenizer.special_token_ids]
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert joined in (whole, f" {whole}")  # a decoder may drop the space at the beginning


def test_bytes_of_every_byte_token_are_that_byte() -> None:
    tokenizer = tokenizer_of("SentencePiece")
    backend = backend_of("SentencePiece")
    assert [tokenizer.token_bytes(backend.token_to_id(name)) for name in BYTES] == [
        bytes([value]) for value in range(256)
    ]


@pytest.mark.parametrize(
    ("family", "token", "text", "data"),
    [
        ("byte level", "Ġ", " ", b" "),
        ("byte level", "Ã", "\ufffd", b"\xc3"),
        ("byte level", "</s>", "</s>", b"</s>"),
        ("byte level", "[é]", "[\ufffd]", b"[\xe9]"),  # the decoder takes é for a byte's name
        ("SentencePiece", "▁dog", " dog", b" dog"),
        ("SentencePiece", "<0xC3>", "\ufffd", b"\xc3"),
        ("SentencePiece", "<0x0A>", "\n", b"\n"),
        ("SentencePiece", "[é]", "[é]", "[é]".encode()),
        ("Unigram", "▁", " ", b" "),
        ("WordPiece", "dog", " dog", b" dog"),
        ("WordPiece", "##e", "e", b"e"),
        ("WordPiece", "</s>", "</s>", b"</s>"),
    ],
)
def test_a_token_alone(family: str, token: str, text: str, data: bytes) -> None:
    tokenizer = tokenizer_of(family)
    token_id = backend_of(family).token_to_id(token)
    assert (tokenizer.token_str(token_id), tokenizer.token_bytes(token_id)) == (text, data)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_id_beyond_the_vocabulary_has_no_text(family: str) -> None:
    tokenizer = tokenizer_of(family)
    unknown = tokenizer.vocab_size + 1
    assert not tokenizer.knows(unknown)
    assert tokenizer.token_str(unknown) == tokenizer.decode([unknown], skip_special_tokens=False) == ""


def test_spaces_between_special_tokens_are_the_decoders_own_and_can_be_left_out() -> None:
    tokenizer = tokenizer_of("WordPiece")
    s, end, dog = (backend_of("WordPiece").token_to_id(t) for t in ("<s>", "</s>", "dog"))
    ids = [s, s, dog, end, end, dog]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> <s> dog </s> </s> dog"
    without = tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert without == "<s><s> dog </s></s> dog"


# --- Hostile texts, threads, imports ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("piece", ["a", " ", "\x00", "😀", "</s>", "1", "\U0010ffff"])
def test_long_texts_of_one_character_are_encoded(family: str, piece: str) -> None:
    ids = tokenizer_of(family).encode(piece * 100_000, add_special_tokens=True)
    assert isinstance(ids, list)


def test_the_same_ids_from_several_threads() -> None:
    tokenizer = tokenizer_of("byte level")
    lines = [f"the dog {i} isn't {'é' * (i % 7)}" for i in range(200)]
    want = [tokenizer.encode(line, add_special_tokens=False) for line in lines]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda line: tokenizer.encode(line, add_special_tokens=False), lines))
        back = list(pool.map(lambda ids: tokenizer.decode(ids, skip_special_tokens=False), got))
    assert got == want
    assert back == lines


def test_loading_a_tokenizer_imports_neither_jax_nor_transformers(tmp_path: Path) -> None:
    write_directory(tmp_path / "..", "byte level")
    code = (
        "import sys; from pathlib import Path; from jaxserve.tokenizer import load_tokenizer\n"
        "import jaxserve.gguf_tokenizer, jaxserve.detokenizer, jaxserve.chat_template, jaxserve.generation_config\n"
        "load_tokenizer(Path(sys.argv[1])); "
        "print([m for m in ('jax', 'flax', 'transformers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "..")],
        capture_output=True,
        text=True,
        check=True,
        cwd=DATA.parents[1],
    )
    assert done.stdout.strip() == "[]"


# --- GGUF ---------------------------------------------------------------------------------------------------


def write_gguf(path: Path, family: str, kind: str, *, scores: bool = False, **extra: Any) -> Path:
    """The tiny tokenizer as llama.cpp's converter would store it."""
    backend = backend_of(family)
    model = json.loads(backend.to_str())["model"]
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=lambda token: vocab[token])
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(model["merges"])))}
    types = {"<unk>": 2, **dict.fromkeys(set(SPECIAL) - {"<unk>"}, 3), **dict.fromkeys(BYTES, 6)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types([types.get(token, 1) for token in tokens])
    if scores:
        writer.add_token_scores([-float(ranks.get(token, 10**6)) for token in tokens])
    else:
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(vocab["<s>"])
    writer.add_eos_token_id(vocab["</s>"])
    writer.add_unk_token_id(vocab["<unk>"])
    for key, value in extra.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"tokenizer.{key.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(params=["byte level", "SentencePiece, merges", "SentencePiece, scores"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, Tokenizer]:
    """(from a GGUF file, the one it was made from)."""
    family = request.param.partition(",")[0]
    kind = "gpt2" if family == "byte level" else "llama"
    path = write_gguf(tmp_path / "m.gguf", family, kind, scores="scores" in request.param)
    return load_tokenizer(path), tokenizer_of(family)


def test_a_gguf_file_gives_the_ids_and_texts_of_the_tokenizer_that_it_was_made_from(
    both: tuple[Tokenizer, Tokenizer],
) -> None:
    ours, original = both
    assert ours.vocab_size == original.vocab_size
    assert ours.special_token_ids == original.special_token_ids
    for text in [*TEXTS, "the quick brown fox jumps over the lazy dog", "▁ ▁▁", "a  b   c"]:
        ids = original.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == original.decode(
                ids, skip_special_tokens=skip
            )


@pytest.mark.parametrize(
    ("kind", "extra", "before", "behind"),
    [
        ("gpt2", {}, False, False),
        ("gpt2", {"ggml__add_bos_token": True}, True, False),
        ("gpt2", {"ggml__pre": "llama-bpe"}, True, False),  # llama.cpp's rule for Llama 3
        ("gpt2", {"ggml__pre": "llama-bpe", "ggml__add_bos_token": False}, False, False),
        ("llama", {}, True, False),
        ("llama", {"ggml__add_bos_token": False, "ggml__add_eos_token": True}, False, True),
    ],
)
def test_special_tokens_around_a_text_follow_the_files_flags(
    tmp_path: Path, kind: str, extra: dict[str, Any], before: bool, behind: bool
) -> None:
    family = "byte level" if kind == "gpt2" else "SentencePiece"
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", family, kind, **extra))
    bos, eos = (backend_of(family).token_to_id(token) for token in ("<s>", "</s>"))
    plain = tokenizer.encode("the dog", add_special_tokens=False)
    assert tokenizer.encode("the dog", add_special_tokens=True) == [bos] * before + plain + [eos] * behind


def test_the_ends_of_turn_and_message_of_a_gguf_file_end_a_sequence(tmp_path: Path) -> None:
    extra = {"ggml__eot_token_id": 3, "ggml__eom_token_id": 10**6, "chat_template": "T"}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", "byte level", "gpt2", **extra))
    assert tokenizer.eos_token_ids == (backend_of("byte level").token_to_id("</s>"), 3)
    assert tokenizer.chat_template == "T"


@pytest.mark.parametrize(
    ("kind", "extra", "message"),
    [
        ("t5", {}, "tokenizer.ggml.model 't5' is not supported"),
        ("gpt2", {"ggml__pre": "new-bpe"}, "tokenizer.ggml.pre 'new-bpe' is not supported"),
    ],
)
def test_a_gguf_tokenizer_of_an_unknown_kind_is_refused(
    tmp_path: Path, kind: str, extra: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", "byte level", kind, **extra)
    with pytest.raises(ModelLoadError, match=message):
        load_tokenizer(path)


def test_merges_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(["a c"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="merges do not fit the vocabulary"):
        load_tokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("default", "12", ["12"]),
        ("smollm", "12", ["1", "2"]),
        ("default", "zz", ["z", "z"]),
        ("llama-bpe", "zz", ["zz"]),  # in the vocabulary, though no merges lead there
        ("default", "z<think>z", ["z", "<think>", "z"]),
    ],
)
def test_a_gguf_file_names_how_texts_are_split(
    tmp_path: Path, pre: str, text: str, tokens: list[str]
) -> None:
    vocab = [*"12z<>think", "12", "zz", "<think>"]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([1] * (len(vocab) - 1) + [4])
    writer.add_token_merges(["1 2"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == [vocab.index(token) for token in tokens]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text  # <think> is user-defined, not special


@pytest.mark.parametrize("name", sorted(name for name, split in SPLITS.items() if split is not None))
def test_pre_tokenizers_split_as_transformers_do(name: str) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    from tokenizers import Regex

    text = "I'LL won't naïve ÉCOLE camelCase 1234567 x=1;\r\n\n\t  end!? 日本語123 //\n /"
    ours, theirs = (
        pre_tokenizers.Split(Regex(str(split)), behavior="isolated").pre_tokenize_str(text)
        for split in (SPLITS[name], mapping.GGUF_PRE_TOKENIZER_SPLITS[name])
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["x", "\n\n", "1", "2", "³", ".", "\n ", "4", " it"]),
        ("default", ["x", "\n", "\n", "12³", ".", "\n", " 4", " it"]),
    ],
)
def test_digits_are_cut_off_before_white_space_is_split_where_the_pre_tokenizer_says_so(
    tmp_path: Path, pre: str, pieces: list[str]
) -> None:
    # llama.cpp's smollm applies \p{N} first and GPT-2's expression to what is left, as the tokenizer.json that
    # the models were published with; so line breaks before a number are one piece
    backend = load_tokenizer(write_gguf(tmp_path / "m.gguf", "byte level", "gpt2", ggml__pre=pre))._backend
    assert backend.pre_tokenizer is not None
    text = "x\n\n12³.\n 4 it"
    found = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert found == pieces


# --- The demo model -----------------------------------------------------------------------------------------


@pytest.mark.model
def test_ids_and_texts_of_the_demo_model_are_those_of_transformers(demo_model_path: Path) -> None:
    tokenizer = load_tokenizer(demo_model_path)
    for row in json.loads((DATA / "demo_tokens.json").read_text()):
        assert tokenizer.encode(row["text"], add_special_tokens=True) == row["ids"]
        assert tokenizer.encode(row["text"], add_special_tokens=False) == row["ids_without_special"]
        ids = row["ids_without_special"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == row["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["decoded_without_special"]
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == row["decoded"]
