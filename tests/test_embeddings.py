"""Embeddings in prompts, against diffusers' own way: tokens of the vocabulary whose rows are the vectors.

Its load_textual_inversion adds them to a copy of the pipeline, and tests/oracle.py reads prompts with these tokens.
"""

import copy
import functools
from dataclasses import replace

import oracle
import pytest
import seams
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

NAMES = {"BadHands": 3, "badhands-v2": 1, "wide": 40, "neg (XL)": 2}  # and how many vectors each has
PARTS = ("clip_l", "clip_g")
MODES = ("blend", "concat", "truncate")


def drawn(pipe, count, seed):
    """The tensors of an embedding, as large as the pipeline's own rows."""
    dice = torch.Generator().manual_seed(seed)
    tables = [encoder.get_input_embeddings().weight for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    return {
        part: torch.randn(count, table.shape[1], generator=dice) * table.std().item()
        for part, table in zip(PARTS, tables, strict=True)
    }


def read(pipe):
    """One of each of NAMES."""
    found = [seams.read_embedding(name, drawn(pipe, n, seed), pipe) for seed, (name, n) in enumerate(NAMES.items())]
    return {embedding.name: embedding for embedding in found}


@pytest.fixture
def embeddings(pipe):
    return read(pipe)


@pytest.fixture
def encode(pipe, embeddings):
    """encode(prompt, ...) by an encoder that has seen nothing yet; embeddings: others than those of NAMES."""
    encoder, known = seams.PromptEncoder(pipe), embeddings

    def encode_with(prompt, negative="", embeddings=known, **fields):
        request = replace(seams.parse({"prompt": "-", **fields}), prompt=prompt, negative_prompt=negative)
        with torch.inference_mode():
            return encoder.encode(request, (), embeddings)

    return encode_with


@functools.cache
def copy_with_tokens(pipe):
    """A copy of the pipeline whose vocabulary has token0, token1 ... for the embeddings of NAMES."""
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    copied = StableDiffusionXLPipeline(**pipe.components | {name: copy.deepcopy(getattr(pipe, name)) for name in names})
    for i, embedding in enumerate(read(pipe).values()):
        for part, number in zip(PARTS, ("", "_2"), strict=True):
            encoder, tokenizer = getattr(copied, f"text_encoder{number}"), getattr(copied, f"tokenizer{number}")
            vectors = {f"token{i}": getattr(embedding, part)}
            copied.load_textual_inversion(vectors, token=f"token{i}", text_encoder=encoder, tokenizer=tokenizer)
            encoder.text_model.eos_token_id = tokenizer.eos_token_id  # 2 means the largest id, which the tokens' are
    return copied


@pytest.fixture
def with_tokens(pipe):
    return copy_with_tokens(pipe)


def tokens(name):
    """What stands for an embedding in a prompt for with_tokens."""
    i = [*NAMES].index(name)
    return " ".join([f"token{i}", *(f"token{i}_{k}" for k in range(1, NAMES[name]))])


def tensors(conditioning):
    """In the order of diffusers' encode_prompt."""
    prompt, negative = conditioning.prompt, conditioning.negative
    return prompt.embeds, negative.embeds, prompt.pooled, negative.pooled


def assert_close(found, expected, most=1e-5):
    """Equal to rounding."""
    for a, b in zip(found, expected, strict=True):
        assert oracle.relative(a, b) < most


# ---------------------------------------------------------------------------------------------------------------------
# tensors

PROMPTS = [
    "a photo, {BadHands}",
    "{BadHands}",
    "({BadHands}:1.3), a [{badhands-v2}] cat",
    "a cat BREAK {wide}, ({BadHands} and {BadHands}:0.5)",
    "red brick house, " * 18 + "{wide}, ({badhands-v2}:1.4) sea",
    "wow!! {BadHands}!",
]


@pytest.mark.parametrize("emphasis", ["no norm", "original"])
@pytest.mark.parametrize("mode", ["blend", "concat"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_as_tokens_of_the_vocabulary(encode, with_tokens, prompt, mode, emphasis):
    """States and pooled vectors, weighted and chunked, as prompt and as negative prompt, are those of real tokens."""
    ours = prompt.format_map({name: name for name in NAMES})
    theirs = prompt.format_map({name: tokens(name) for name in NAMES})
    found = encode(ours, "fog, " + ours, long_prompt=mode, emphasis=emphasis)
    expected = oracle.conditioning(with_tokens, theirs, "fog, " + theirs, mode, 2, emphasis)
    assert_close(tensors(found), expected, 1e-4 if emphasis == "original" else 1e-5)  # it divides by a small mean
    assert not found.warnings


@pytest.mark.parametrize("mode", MODES)
def test_as_diffusers_has_it(encode, with_tokens, mode):
    """A short prompt gives the tensors of encode_prompt, which puts the tokens in place of the name itself."""
    found = encode("a cat, BadHands", "wide", long_prompt=mode)
    assert_close(tensors(found), with_tokens.encode_prompt("a cat, token0", negative_prompt="token2"))


@pytest.mark.parametrize("before", [36, 50, 74, 75])
def test_no_chunk_is_cut_inside_an_embedding(encode, with_tokens, before):
    """One that does not fit into what is left of a chunk starts the next."""
    words = "cat " * before
    found = encode(f"{words}wide dog", long_prompt="concat")
    expected = [with_tokens.encode_prompt(text)[0] for text in (words, "token2 dog")]
    assert_close([found.prompt.embeds], [torch.cat(expected, dim=1)])


@pytest.mark.parametrize(("before", "kept"), [(35, True), (36, False)])
def test_truncate_keeps_an_embedding_whole_or_not_at_all(encode, with_tokens, before, kept):
    """Where the window ends in one, all of it is left out."""
    words = "cat " * before
    found = encode(f"{words}wide dog", long_prompt="truncate")
    assert_close([found.prompt.embeds], with_tokens.encode_prompt(words + "token2" * kept)[:1])


def test_one_that_fills_a_chunk(pipe, encode):
    """75 vectors beside others of 75 are a chunk each, unspaced too."""
    full = {name: seams.read_embedding(name, drawn(pipe, 75, seed), pipe) for seed, name in enumerate("xy")}
    assert encode("x,y", embeddings=full, long_prompt="concat").prompt.chunks == 3  # the comma has one of its own


def test_half_precision(pipe, embeddings):
    """Encoders in float16 take the vectors in float16."""
    half = copy.copy(pipe)
    half.text_encoder, half.text_encoder_2 = (copy.deepcopy(e).half() for e in (pipe.text_encoder, pipe.text_encoder_2))
    request = seams.parse({"prompt": "a cat, BadHands"})
    with torch.inference_mode():
        found, expected = (seams.PromptEncoder(p).encode(request, (), embeddings).prompt for p in (half, pipe))
    assert found.embeds.dtype == torch.float16
    assert oracle.relative(found.embeds.float(), expected.embeds) < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize(
    ("prompt", "used"),
    [
        *(
            (text, ["BadHands"])
            for text in (
                "badhands",
                "embedding:badhands",
                "a BADHANDS.",
                "(BadHands:1.2), bad",
                "[BadHands]",
                "x,BadHands,y",
            )
        ),
        *(
            (text, ["BadHands"])
            for text in (
                "embedding:badhands.pt",
                "(embedding:badhands.safetensors:1.2)",
                "(Embedding:BadHands:0.8)",
                "BadHands's",
                "\\(BadHands\\)",
            )
        ),
        ("BadHands.pt", ["BadHands"]),
        *((text, []) for text in ("badhand", "badhandss", "mybadhands", "bad hands", "badhands_v2", "badhands-v3")),
        *((text, []) for text in ("x-badhands", "\\BadHands", "<lora:BadHands:0>", "漢字badhands", "")),
        *((text, ["badhands-v2"]) for text in ("badhands-v2", "embedding:BadHands-V2,", "(badhands-v2)")),
        ("wide, badhands-v2 and badhands", ["BadHands", "badhands-v2", "wide"]),
        ("a NEG (xl), cat", ["neg (XL)"]),
        ("neg \\(XL\\)", []),
    ],
)
def test_which_words_are_uses(encode, prompt, used):
    """A name as a whole word, whatever its case, or behind "embedding:"; the longest wins; no part of a word."""
    found = encode(prompt)
    assert list(found.embeddings) == used and not found.warnings
    if not used:
        assert_close([found.prompt.embeds], [encode(prompt, embeddings={}).prompt.embeds])


def test_both_prompts_tell_what_they_used(encode):
    """Names of the negative prompt are told too, where it has an effect."""
    assert encode("a cat, wide", "BadHands").embeddings == ("BadHands", "wide")
    assert encode("a cat, wide", "BadHands", guidance_scale=1).embeddings == ("wide",)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a embedding:nobody, (embedding:no.one-2:1.2)", "nobody, no.one-2"),
        ("embedding:BadHands_v9", "BadHands_v9"),
        (" ".join(f"embedding:e{i}" for i in range(9)), "e0, e1, e2, e3, e4 and 4 more"),
    ],
)
def test_an_unknown_embedding_is_words(pipe, encode, prompt, named):
    """It is encoded as it stands, and a warning names it."""
    found = encode(prompt, prompt)
    assert found.warnings == (f"the prompts name embeddings that are not here, read as words: {named}",)
    assert found.embeddings == ()
    assert_close([found.prompt.embeds], [encode(prompt, embeddings={}).prompt.embeds])


@pytest.mark.parametrize("prompt", ["(embedding:1.2)", "embedding: a cat", "myembedding:x", "\\embedding:x"])
def test_the_word_embedding_is_a_word(encode, prompt):
    """Where it names nothing there is nothing to warn of."""
    assert encode(prompt).warnings == ()


# ---------------------------------------------------------------------------------------------------------------------
# what is remembered


def test_other_vectors_are_another_prompt(pipe, encode, embeddings):
    """A prompt seen before is encoded anew where the name stands for other vectors, or for nothing."""
    other = {"BadHands": seams.read_embedding("BadHands", drawn(pipe, 3, seed=9), pipe)}
    found = [encode("a cat, badhands", embeddings=known).prompt for known in (embeddings, other, {}, embeddings)]
    assert torch.equal(found[0].embeds, found[3].embeds)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert oracle.relative(found[i].embeds, found[j].embeds) > 1e-3


def test_the_same_vectors_are_the_same_prompt(pipe, encode, embeddings):
    """Read again, an embedding is what it was: nothing is encoded."""
    first = encode("a cat, badhands").prompt.embeds
    again = read(pipe)
    calls = []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    second = encode("a cat, badhands", embeddings=dict(reversed(again.items()))).prompt.embeds
    hook.remove()
    assert torch.equal(first, second) and not calls


def test_chunks_that_differ_in_vectors_alone(pipe, encode):
    """Of two embeddings with as many vectors each chunk has its own."""
    pair = {name: seams.read_embedding(name, drawn(pipe, 2, seed), pipe) for seed, name in enumerate("xy")}
    found = encode("x BREAK y BREAK x", embeddings=pair, long_prompt="concat").prompt.embeds
    first, second, third = found.split(77, dim=1)
    assert torch.equal(first, third) and oracle.relative(first, second) > 1e-3


def test_nothing_is_left_in_the_encoders(pipe, encode):
    """After a prompt with an embedding, also one that failed and was cut, the encoders are what they were."""
    plain = pipe.encode_prompt("a cat")

    def fail(_module, args):
        if len(args[0]) > 1:
            raise RuntimeError("no")

    hook = pipe.text_encoder_2.register_forward_pre_hook(fail)
    found = encode("a cat BREAK badhands")
    hook.remove()
    assert "cut to its first 75 tokens" in found.warnings[0] and found.embeddings == ("BadHands",)
    assert torch.equal(pipe.encode_prompt("a cat")[0], plain[0])
    assert all(
        not encoder.get_input_embeddings()._forward_hooks for encoder in (pipe.text_encoder, pipe.text_encoder_2)
    )


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_of_every_type(pipe, tmp_path, dtype):
    """The vectors are the file's, in float32, whatever type they have there; other tensors do not matter."""
    given = {part: tensor.to(dtype) for part, tensor in drawn(pipe, 4, seed=1).items()}
    save_file(given | {"clip_l_out": torch.ones(1)}, tmp_path / "x.safetensors")
    found = seams.read_embedding("x", tmp_path / "x.safetensors", pipe)
    assert torch.equal(found.clip_l, given["clip_l"].float()) and torch.equal(found.clip_g, given["clip_g"].float())
    assert found == seams.read_embedding("x", given, pipe)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda _: {"emb_params": torch.ones(2, 768)}, "an embedding for Stable Diffusion 1 or 2"),
        (lambda t: {"clip_l": t["clip_l"]}, "no embedding for SDXL: it lacks the vectors clip_g$"),
        (lambda _: {"lora_te1_x.lora_up.weight": torch.ones(2, 2)}, "it lacks the vectors clip_g and clip_l"),
        (lambda t: t | {"clip_g": t["clip_g"][:1]}, r"as many vectors clip_l as clip_g, 1 to 75, got \[2, 1\]"),
        (lambda t: {part: tensor[:0] for part, tensor in t.items()}, r"1 to 75, got \[0, 0\]"),
        (lambda t: {part: tensor.repeat(38, 1) for part, tensor in t.items()}, r"1 to 75, got \[76, 76\]"),
        (
            lambda t: t | {"clip_l": t["clip_l"][:, 1:]},
            r"its clip_l must be floating-point numbers \(n, \d+\), got \[2, ",
        ),
        (lambda t: t | {"clip_g": t["clip_g"][0]}, "its clip_g must be"),
        (lambda t: t | {"clip_g": t["clip_g"].int()}, "its clip_g must be floating-point"),
        (lambda t: t | {"clip_g": t["clip_g"] / 0}, "holds NaN or infinite numbers"),
        (lambda t: t | {"clip_l": t["clip_l"] * float("nan")}, "holds NaN or infinite numbers"),
    ],
)
def test_what_is_no_embedding_for_sdxl_is_refused(pipe, tmp_path, change, sentence):
    """Each by a sentence that says what is wrong, from a file as from tensors."""
    tensors = change(drawn(pipe, 2, seed=1))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "x.safetensors")
    for source in (tensors, tmp_path / "x.safetensors"):
        with pytest.raises(seams.BadModel, match=sentence):
            seams.read_embedding("x", source, pipe)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x08" + bytes(7) + b"{}      "])
def test_a_damaged_file_is_refused(pipe, tmp_path, content):
    """What safetensors cannot read, or what holds nothing."""
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(seams.BadModel, match=r"damaged|lacks"):
        seams.read_embedding("x", tmp_path / "x.safetensors", pipe)
