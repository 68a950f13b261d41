"""Prompts: A1111's language, and what the text encoders make of it, against tests/oracle.py and diffusers itself."""

import base64
import copy
import io
import logging
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import seams
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import handler

ANY = settings(
    max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
MODES = ("blend", "concat", "truncate")
WORD = ["red", "brick", "house", "by", "the", "sea", "with", "white", "clouds"]
LONG = " ".join(random.Random(0).choices(WORD, k=200)) + " "  # as many tokens


def encode(encoder, prompt, negative="", stack=(), **fields):
    request = replace(seams.parse({"prompt": "-", **fields}), prompt=prompt, negative_prompt=negative)
    with torch.inference_mode():
        return encoder.encode(request, stack, {})


def tensors(conditioning):
    """In the order of diffusers' encode_prompt."""
    return (
        *(conditioning.prompt.embeds, conditioning.negative.embeds),
        *(conditioning.prompt.pooled, conditioning.negative.pooled),
    )


def assert_close(found, expected, most=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert oracle.relative(a, b) < most


@pytest.fixture
def encoder(pipe):
    """One that has seen nothing yet."""
    return seams.PromptEncoder(pipe)


@pytest.fixture
def rows(pipe):
    """The batch size of every forward of each text encoder."""
    seen = {"text_encoder": [], "text_encoder_2": []}
    hooks = [
        getattr(pipe, name).register_forward_pre_hook(lambda _module, args, sizes=sizes: sizes.append(len(args[0])))
        for name, sizes in seen.items()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.fixture
def refuse(pipe):
    """refuse(condition, error) makes text_encoder raise for the ids that meet a condition."""
    hooks = []

    def refuse_ids(condition, error):
        def hook(_module, args):
            if condition(args[0]):
                raise error

        hooks.append(pipe.text_encoder.register_forward_pre_hook(hook))

    yield refuse_ids
    for hook in hooks:
        hook.remove()


# ---------------------------------------------------------------------------------------------------------------------
# the language


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a [b", [("a ", 1.0), ("b", 1 / 1.1)]),
        ("unopened) here]", [("unopened) here]", 1.0)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        (r"a \\ b \( c", [("a \\ b ( c", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("((a))", [("a", 1.1 * 1.1)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("(a:1.3)", [("a", 1.3)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("(a:-1)", [("a", -1.0)]),
        ("a:1.3) b", [("a:1.3) b", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        ("(a:1.0) b", [("a b", 1.0)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                *(("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55)),
                *((", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1)),
            ],
        ),
    ],
)
def test_documented_cases(prompt, expected):
    """A1111's own examples, and what its documentation says of brackets and escapes."""
    assert seams.parse_prompt(prompt) == [expected]


@pytest.mark.parametrize(
    ("prompt", "stretches"),
    [
        ("a BREAK b", ["a ", " b"]),
        ("BREAK", ["", ""]),
        ("a,BREAK,b", ["a,", ",b"]),
        ("a BREAKS b_BREAK break", ["a BREAKS b_BREAK break"]),
        ("(a BREAK b)", ["a ", " b"]),
    ],
)
def test_break_is_the_upper_case_word_alone(prompt, stretches):
    """BREAK splits a prompt, within brackets too; longer or lower-case words do not."""
    assert ["".join(text for text, _ in stretch) for stretch in seams.parse_prompt(prompt)] == stretches


def without_breaks(stretches):
    """handler's stretches in the oracle's form: one list, None for a BREAK, no empty texts."""
    parts = [part for stretch in stretches for part in [*stretch, None]][:-1]
    return [part for part in parts if part is None or part[0]]


@ANY
@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(
            st.sampled_from(
                [
                    *"()[]\\:,a b",
                    "((",
                    "))",
                    ":1.3)",
                    ": .5 )",
                    ":-1)",
                    ":40)",
                    ":1.2.3)",
                    " BREAK ",
                    "BREAKs",
                    "cat",
                    "漢字",
                    "1.1",
                ]
            ),
            max_size=40,
        ).map("".join),
    )
)
@example("foo(\\:1.3)bar")
def test_parser_against_the_oracle(prompt):
    """Any text parses, to what the oracle reads character by character, or holds a weight beyond 100."""
    expected = [part for part in oracle.parse(prompt) if part is None or part[0]]
    try:
        found = seams.parse_prompt(prompt)
    except seams.refused():
        assert oracle.largest_weight(prompt) > 100
    else:
        assert without_breaks(found) == expected and all(abs(part[1]) <= 100 for part in expected if part)


@pytest.mark.parametrize(
    ("prompt", "text", "tags"),
    [
        ("a cat <lora:film:0.8>", "a cat ", [("film", 0.8)]),
        ("<lora:a><lora:b:-1.5>x", "x", [("a", 1.0), ("b", -1.5)]),
        ("(a <lora:my film (v2):.7>:1.2)", "(a :1.2)", [("my film (v2)", 0.7)]),
        ("<lora:a:0.8:0.6> <lora:b:1:lbw=OUT> <lyco:c:1>", "  ", [("a", 0.8), ("b", 1.0), ("c", 1.0)]),
        ("<lora:> <lora", " <lora", [("", 1.0)]),
        ("a < b: c > d <x:y:1>", "a < b: c > d <x:y:1>", []),
    ],
)
def test_lora_tags(prompt, text, tags):
    """LoRA tags leave the text, with their name and first scale."""
    assert seams.split_lora_tags(prompt) == (text, tags)


def test_lora_tag_with_a_scale_that_is_no_number():
    """Such a scale is refused, with the tag and the rule."""
    answer = handler.handler({"input": {"prompt": "a <lora:real_skin_slider:strong>"}})
    assert answer["code"] == "INVALID_INPUT" and "<lora:real_skin_slider> must be from -10 to 10" in answer["error"]


# ---------------------------------------------------------------------------------------------------------------------
# tensors

WORDS = [
    *(
        "cat",
        "red",
        "house",
        "sea,",
        "photo.",
        "don't",
        "wow!",
        "what?!",
        "naïve",
        "漢字",
        "🎉",
        "1,000",
        "a,b",
        "long_hair",
    ),
    *("masterpiece,", "ultra-detailed", "#1", "…", "intricate", '"quoted."', "<|endoftext", "x" * 30),
]


def random_prompt(rng, most):
    """Words with weights, brackets, BREAKs and escapes; no BREAK touches syntax."""
    parts = []
    for _ in range(rng.randint(1, most)):
        word = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        shape = rng.choices(
            ["{}", "({})", "(({}))", "[{}]", "({}:%s)", "(", r"\({}\)", " BREAK "], [12, 2, 1, 2, 3, 0.1, 1, 0.7]
        )[0]
        if "%s" in shape:
            shape %= rng.choice(["1.3", "0.5", "-0.4", "1", "0", "2.05"])
        parts.append(shape.format(word))
    return rng.choice([" ", ", "]).join(parts)


# of the first 75: every clip_skip with either emphasis, every shape, one to many chunks of both prompts, each count of
# chunks the larger, repeated or filled up
SEEDS = (0, 1, 2, 4, 8, 11, 23, 30, 43, 66, 67)


@pytest.mark.parametrize("mode", ["blend", "concat"])
@pytest.mark.parametrize("seed", SEEDS)
def test_tensors_against_the_oracle(pipe, encoder, mode, seed):
    """Random prompts with weights and BREAKs, in one to many chunks, both ways of emphasis: all four tensors are the
    oracle's, so both encoders' states are merged alike, and pooled ones are averaged."""
    rng = random.Random(seed)
    prompt, negative = random_prompt(rng, 60), rng.choice(["", random_prompt(rng, 40)])
    clip_skip, emphasis = rng.choice([2, 2, 1, 3, 12]), rng.choice(["no norm", "original"])
    found = encode(encoder, prompt, negative, long_prompt=mode, clip_skip=clip_skip, emphasis=emphasis)
    most = 1e-4 if emphasis == "original" else 1e-5  # it divides by a mean that may be near zero
    assert_close(tensors(found), oracle.conditioning(pipe, prompt, negative, mode, clip_skip, emphasis), most)
    assert found.prompt.chunks == len(oracle.chunks(pipe, prompt)) and not found.warnings
    assert found.negative.chunks == (len(oracle.chunks(pipe, negative)) if negative else 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "wow!!! ?! yes!",
        "don't, they'll",
        "日本語 🎉 naïve",
        "cat " * 75,
        "cat " * 73 + "x!",
        "a: b",
        " ",
        "\u200b",
    ],
)
def test_short_plain_prompts_are_diffusers_own(pipe, encoder, prompt, mode):
    """Up to 75 tokens without syntax: the tensors of encode_prompt, "!" and all, for both prompts."""
    found = encode(encoder, prompt, "blurry, ugly!!", long_prompt=mode)
    assert_close(tensors(found), pipe.encode_prompt(prompt, negative_prompt="blurry, ugly!!"))
    found = encode(encoder, "a dog", prompt, long_prompt=mode)
    if prompt.strip():
        assert_close(tensors(found), pipe.encode_prompt("a dog", negative_prompt=prompt))


@settings(ANY, max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="()[]\\"), min_size=1, max_size=60))
@example("cat " * 73 + "x!")
def test_any_short_plain_prompt_is_diffusers_own(pipe, prompt):
    """Any Unicode text without brackets, of at most 75 tokens for both tokenizers, gives encode_prompt's tensors."""
    assume(all(len(tokenizer.tokenize(prompt)) <= 75 for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)))
    found = encode(seams.PromptEncoder(pipe), prompt)
    assert_close(tensors(found)[::2], pipe.encode_prompt(prompt)[::2])


@pytest.mark.parametrize("clip_skip", [1, 2, 3, 12])
def test_clip_skip(pipe, encoder, clip_skip):
    """hidden_states[-clip_skip] of both encoders, for both prompts; diffusers counts from the penultimate layer."""
    found = encode(encoder, "a cat", "a dog", clip_skip=clip_skip)
    for prompt, embeds in (("a cat", found.prompt.embeds), ("a dog", found.negative.embeds)):
        assert_close([embeds], pipe.encode_prompt(prompt, clip_skip=clip_skip - 2)[:1])


@pytest.mark.parametrize("mode", MODES)
def test_half_precision(pipe, encoder, mode):
    """With encoders in float16 all tensors are float16, and near those of float32."""
    half = {name: copy.deepcopy(getattr(pipe, name)).half() for name in ("text_encoder", "text_encoder_2")}
    half_pipe = SimpleNamespace(
        tokenizer=pipe.tokenizer, tokenizer_2=pipe.tokenizer_2, _execution_device=torch.device("cpu"), **half
    )
    prompts = (LONG + "(cat:1.3)", "[fog:0.7]")
    found = tensors(encode(seams.PromptEncoder(half_pipe), *prompts, long_prompt=mode))
    expected = tensors(encode(encoder, *prompts, long_prompt=mode))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float16 and oracle.relative(a.float(), b) < 0.02


@pytest.mark.parametrize("prompt", [LONG, "x" * 2_000, "wow! " * 100])
def test_truncate_is_what_the_encoder_does(pipe, encoder, prompt, caplog):
    """long_prompt "truncate" gives encode_prompt's own tensors, and says one chunk."""
    found = encode(encoder, prompt, prompt + "!", long_prompt="truncate")
    assert_close(tensors(found), pipe.encode_prompt(prompt, negative_prompt=prompt + "!"))
    assert (found.prompt.chunks, found.negative.chunks) == (1, 1)


def test_emphasis_in_truncate_mode(pipe, encoder):
    """Emphasis multiplies the hidden states of its tokens there as well; BREAK cuts nothing off."""
    found = encode(encoder, "a (cat:1.5) BREAK dog", long_prompt="truncate").prompt.embeds
    plain = pipe.encode_prompt("a cat dog")[0].clone()
    plain[:, 2] *= 1.5
    assert_close([found], [plain])


@pytest.mark.parametrize("mode", MODES)
def test_original_emphasis_restores_each_mean(pipe, encoder, mode):
    """A1111's: of each encoder's states the mean over the 77 positions is as without weights; pooled has none."""
    width = pipe.text_encoder.config.hidden_size
    plain = encode(encoder, "a red cat by the sea", long_prompt=mode)
    no_norm, original = (
        encode(encoder, "a (red:1.8) cat [by the] sea", long_prompt=mode, emphasis=emphasis)
        for emphasis in ("no norm", "original")
    )
    assert oracle.relative(no_norm.prompt.embeds, original.prompt.embeds) > 1e-3
    for part in (slice(width), slice(width, None)):
        means = [found.prompt.embeds[..., part].mean().item() for found in (plain, original)]
        assert means[1] == pytest.approx(means[0], rel=1e-3, abs=1e-6)
    for found in (no_norm, original):
        assert_close([found.prompt.pooled], [plain.prompt.pooled])


def test_emphasis_changes_the_image(pipe):
    """A job with a weight is drawn otherwise with emphasis "original", one without weights is not; the answer says
    which it was."""
    job = {"width": 256, "height": 256, "steps": 1, "seed": 3}

    def answer(prompt, emphasis):
        reply = handler.handler({"input": {**job, "prompt": prompt, "emphasis": emphasis}})
        assert reply["metadata"]["emphasis"] == emphasis
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["images"][0]))), dtype=int)

    assert np.abs(answer("a (cat:1.8)", "no norm") - answer("a (cat:1.8)", "original")).max() > 2
    assert np.abs(answer("a cat", "no norm") - answer("a cat", "original")).max() <= 2


@pytest.mark.parametrize("negative", ["", " \n", "<lora:a:1>", " <lora:a> "])
@pytest.mark.parametrize("mode", MODES)
def test_empty_negative_prompt_is_zeros(encoder, negative, mode):
    """Zeros of the prompt's length, embeddings and pooled, as SDXL was trained."""
    found = encode(encoder, LONG, negative, long_prompt=mode)
    assert found.negative.embeds.shape == found.prompt.embeds.shape
    assert not found.negative.embeds.any() and not found.negative.pooled.any()
    assert found.negative.chunks == 0


def breaks(*words):
    """A chunk for each word."""
    return " BREAK ".join(words)


def test_concat(pipe, encoder):
    """n windows side by side; pooled of the first chunk; a prompt of one chunk repeated to the other's length."""
    found = encode(encoder, LONG, "fog", long_prompt="concat")
    assert found.prompt.embeds.shape == found.negative.embeds.shape == (1, 77 * 3, 96)
    assert (found.prompt.chunks, found.negative.chunks) == (3, 1)
    first = handler.tokenize_chunks(pipe.tokenizer, LONG)[0]
    assert_close([found.prompt.pooled], [pipe.encode_prompt(first)[2]])
    assert_close([found.negative.embeds], [torch.cat([pipe.encode_prompt("fog")[0]] * 3, dim=1)])
    turned = encode(encoder, "fog", LONG, long_prompt="concat")
    assert_close(tensors(turned)[:2], tensors(found)[1::-1])


def test_concat_of_two_and_three_chunks(pipe, encoder):
    """Both are repeated to six chunks, which the UNet's attention cannot tell from two and three."""
    two, three = breaks("red", "sea"), breaks("fog", "rain", "snow")
    found = encode(encoder, two, three, long_prompt="concat")
    alone = [encode(encoder, prompt, long_prompt="concat").prompt.embeds for prompt in (two, three)]
    expected = torch.cat([alone[0]] * 3, dim=1), torch.cat([alone[1]] * 2, dim=1)
    assert found.prompt.embeds.shape[1] == 6 * 77
    assert_close(tensors(found)[:2], expected)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for short, repeated, pooled in zip(alone, tensors(found)[:2], tensors(found)[2:], strict=True):
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]])}
        with torch.no_grad():
            drawn = [
                pipe.unet(latents, 500, states, added_cond_kwargs=added, return_dict=False)[0]
                for states in (short.clone(), repeated.clone())
            ]
        assert oracle.relative(*drawn) < 1e-5


@pytest.mark.parametrize(("shorter", "longer", "repeated"), [(5, 7, False), (4, 7, True), (5, 6, False), (6, 8, True)])
def test_concat_of_many_chunks(pipe, encoder, shorter, longer, repeated):
    """Where the common multiple is more than four times the longer, the shorter is filled up with empty chunks."""
    prompts = [breaks(*"abcdefgh"[:n]) for n in (shorter, longer)]
    found = encode(encoder, *prompts, long_prompt="concat")
    assert (found.prompt.chunks, found.negative.chunks) == (shorter, longer)
    lengths = {tensor.shape[1] // 77 for tensor in tensors(found)[:2]}
    short = encode(encoder, prompts[0], long_prompt="concat").prompt.embeds
    assert_close([found.prompt.embeds[:, : 77 * shorter]], [short])
    rest = found.prompt.embeds[:, 77 * shorter :]
    if repeated:
        assert lengths == {28 if longer == 7 else 24}
        assert_close([rest[:, : 77 * shorter]], [short])
    else:
        assert lengths == {longer}
        assert_close([rest], [torch.cat([pipe.encode_prompt("")[0]] * (longer - shorter), dim=1)])


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a BREAK b", 2),
        ("a BREAK", 1),
        ("BREAK a", 2),
        ("BREAK", 1),
        ("a BREAK BREAK b", 3),
        ("", 1),
        (LONG + "BREAK b", 4),
    ],
)
def test_break_fills_its_chunk(encoder, prompt, chunks):
    """A BREAK fills the chunk, be it empty, as A1111 does; one at the end opens none."""
    found = encode(encoder, prompt, long_prompt="concat")
    assert found.prompt.chunks == chunks and found.prompt.embeds.shape[1] == 77 * chunks


@pytest.mark.parametrize(
    "special", ["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<|endo\x00ftext|>", "<\\|endoftext|>"]
)
def test_special_tokens_are_read_as_text(encoder, special):
    """What follows a written special token still counts, for the pooled embedding too."""
    cat, dog = (encode(encoder, f"a {special} {animal}") for animal in ("cat", "dog"))
    assert not torch.equal(cat.prompt.embeds, dog.prompt.embeds)
    assert not torch.equal(cat.prompt.pooled, dog.prompt.pooled)


@settings(ANY, max_examples=30)
@given(st.text(max_size=300), st.sampled_from(MODES))
def test_any_text_is_encoded(pipe, prompt, mode):
    """Any Unicode text, short of lone surrogates, which jobs replace, gives finite tensors without a warning."""
    found = encode(seams.PromptEncoder(pipe), prompt, prompt[::-1], long_prompt=mode)
    assert all(tensor.isfinite().all() for tensor in tensors(found)) and not found.warnings


@pytest.mark.parametrize("mode", ["blend", "concat"])
def test_every_chunk_counts(encoder, mode):
    """Another word at either end of any of eight chunks changes the tensor."""
    words = ["tree"] * 600
    plain = encode(encoder, " ".join(words), long_prompt=mode).prompt.embeds
    for place in [p for start in range(0, 600, 75) for p in (start, start + 74)]:
        changed = " ".join([*words[:place], "kitten", *words[place + 1 :]])
        assert oracle.relative(encode(encoder, changed, long_prompt=mode).prompt.embeds, plain) > 1e-4


@pytest.mark.parametrize("mode", ["blend", "concat"])
@pytest.mark.parametrize("place", [0, 80, 155, 299])
def test_every_chunk_changes_the_image(pipe, mode, place):
    """A word in each of four chunks changes the picture."""

    def picture(*words):
        job = {"prompt": " ".join(words), "long_prompt": mode, "width": 256, "height": 256, "steps": 1, "seed": 3}
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(handler.handler({"input": job})["images"][0]))))

    words = ["tree"] * 300
    assert (picture(*words) != picture(*words[:place], "kitten", *words[place + 1 :])).any()


# ---------------------------------------------------------------------------------------------------------------------
# blending


def test_a_jobs_chunks_are_blended_together(pipe, encoder):
    """Both encoders' states at once, (1, 77, 2048), so that a merge is the same in both; EOS states and pooled
    embeddings are the mean of all chunks'."""
    found = encode(encoder, LONG)
    chunks = handler.tokenize_chunks(pipe.tokenizer, LONG)
    alone = [encode(encoder, chunk) for chunk in chunks]
    counts = [len(pipe.tokenizer(chunk, add_special_tokens=False).input_ids) for chunk in chunks]
    expected = oracle.shared_eos([chunk.prompt.embeds for chunk in alone], counts)
    expected = handler.build_77_token_tensor(expected, counts)
    pooled = torch.stack([chunk.prompt.pooled for chunk in alone]).mean(dim=0)
    assert_close([found.prompt.embeds, found.prompt.pooled], [expected, pooled])


def test_each_encoders_own_eos(pipe, encoder):
    """Where a chunk is longer for one encoder ("!!!" is one token for the first, three for the second), the mean stands
    at either's own EOS."""
    texts = ["a red cat!!! in a wood", "a blue house on a hill by the sea"]
    found = encode(encoder, " BREAK ".join(texts)).prompt.embeds[0]
    states, at = [encode(encoder, text).prompt.embeds[0] for text in texts], 0
    width = pipe.text_encoder.config.hidden_size
    for tokenizer, columns in ((pipe.tokenizer, slice(None, width)), (pipe.tokenizer_2, slice(width, None))):
        counts = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        mean = sum(state[count + 1, columns] for state, count in zip(states, counts, strict=True)) / 2
        assert_close([found[counts[0] + 1, columns]], [mean])
        at = max(at, counts[0])
    assert_close([found[at + 2]], [states[1][1]])  # the second chunk's first token


@pytest.mark.parametrize("max_tokens", [75, 40])
def test_long_prompt_to_embedding(pipe, max_tokens):
    """The blend of its text chunks, each as encode_prompt has it; syntax is text; EOS and pooled are means."""
    prompt = f"a (red:1.3) brick BREAK {LONG}[house]"
    embeds, pooled = handler.long_prompt_to_embedding(pipe, prompt, max_tokens)
    chunks = handler.tokenize_chunks(pipe.tokenizer, prompt, max_tokens)
    encoded = [pipe.encode_prompt(chunk) for chunk in chunks]
    counts = [len(pipe.tokenizer(chunk, add_special_tokens=False).input_ids) for chunk in chunks]
    expected = handler.build_77_token_tensor(oracle.shared_eos([e[0] for e in encoded], counts), counts)
    assert_close([embeds, pooled], [expected, torch.stack([e[2] for e in encoded]).mean(dim=0)])


@pytest.mark.parametrize("prompt", ["", "a cat", "cat " * 75])
def test_short_prompts_need_no_blending(pipe, prompt):
    """(None, None) for what fits into the 77 tokens."""
    assert handler.long_prompt_to_embedding(pipe, prompt) == (None, None)
    assert handler.long_prompt_to_embedding(pipe, "cat " * 76)[0] is not None


# ---------------------------------------------------------------------------------------------------------------------
# cost


@pytest.mark.parametrize("mode", ["blend", "concat"])
def test_one_batch_for_each_encoder(encoder, rows, mode):
    """All chunks of both prompts go through each encoder at once, equal ones once."""
    encode(encoder, LONG + "BREAK a BREAK a", "fog BREAK a", long_prompt=mode)
    expected = 3 + 1 + 1  # LONG, a, fog
    assert rows == {"text_encoder": [expected], "text_encoder_2": [expected]}


def test_prompts_seen_before_cost_nothing(encoder, rows):
    """The last 32 jobs' prompts are encoded once for a stack and the fields that matter, each prompt for itself."""
    jobs = [(f"{i} {LONG}", f"fog {i}") for i in range(32)]
    first = [tensors(encode(encoder, *job)) for job in jobs]
    again = [tensors(encode(encoder, *job)) for job in jobs]
    assert len(rows["text_encoder"]) == 32
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    encode(encoder, jobs[0][1], jobs[5][0])
    assert len(rows["text_encoder"]) == 32  # the other way round
    for other in (
        *({"stack": (("film", 1.0),)}, {"clip_skip": 1}, {"long_prompt": "concat"}, {"emphasis": "original"}),
    ):
        before = len(rows["text_encoder"])
        encode(encoder, *jobs[31], **other)
        assert len(rows["text_encoder"]) == before + 1, other
    encode(encoder, "new", jobs[31][1])
    assert rows["text_encoder_2"][-1] == 1


def test_memory_is_bounded(encoder, rows):
    """Of more than 64 prompts those not used for longest are forgotten."""
    for prompt in [*range(64), 0, 64, 0, 63]:  # 1 is forgotten for 64
        encode(encoder, str(prompt))
    assert len(rows["text_encoder"]) == 65
    encode(encoder, "1")
    assert len(rows["text_encoder"]) == 66


def test_without_guidance_the_negative_prompt_is_not_encoded(encoder, rows):
    """guidance_scale 1 needs the prompt alone."""
    found = encode(encoder, "a cat", LONG, guidance_scale=1)
    assert not found.negative.embeds.any() and not found.negative.pooled.any()
    assert rows["text_encoder"] == [1] and found.negative.chunks == 0


def test_nothing_is_logged(encoder, caplog, capfd):
    """Encoding prompts of any length brings no library's warning, and no prompt, into the log."""
    with caplog.at_level(logging.INFO):
        for mode in MODES:
            encode(encoder, LONG * 3, "x" * 3_000, long_prompt=mode)
    assert not caplog.records and capfd.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------------
# fallback


def test_prompts_fall_back_independently(pipe, encoder, refuse):
    """Where one prompt's chunks fail, it is cut to 75 tokens with a warning; the other keeps its chunks."""
    refuse(lambda ids: len(ids) > 3, RuntimeError("no such batch in /root/secret"))
    found = encode(encoder, LONG, LONG + LONG)
    assert_close(tensors(found)[::2], tensors(encode(encoder, LONG))[::2])
    assert_close(tensors(found)[1::2], pipe.encode_prompt(LONG * 2)[::2])
    assert (found.prompt.chunks, found.negative.chunks) == (3, 1)
    assert found.warnings == (
        "the chunks of the negative prompt could not be encoded: it was cut to its first 75 tokens",
    )


@pytest.mark.parametrize("mode", ["blend", "concat"])
def test_both_prompts_fall_back(pipe, encoder, refuse, mode):
    """Both cut, both named; a job with it goes on."""
    refuse(lambda ids: len(ids) > 1, ValueError("no"))
    found = encode(encoder, LONG, LONG + "fog", long_prompt=mode)
    assert_close(tensors(found), pipe.encode_prompt(LONG, negative_prompt=LONG))
    assert [warning.split(" could")[0][18:] for warning in found.warnings] == ["prompt", "negative prompt"]
    job = {"prompt": LONG + "x", "long_prompt": mode, "width": 256, "height": 256, "steps": 1}
    answer = handler.handler({"input": job})
    assert len(answer["images"]) == 1 and "could not be encoded" in answer["metadata"]["warnings"][0]


def test_batch_alone_fails(encoder, refuse):
    """Where both prompts succeed each by itself, nothing is lost and nothing is said."""
    refuse(lambda ids: len(ids) > 3, RuntimeError("no"))
    found = encode(encoder, LONG, LONG + "fog")
    assert (found.prompt.chunks, found.negative.chunks, found.warnings) == (3, 3, ())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "OUT_OF_MEMORY"),
        (MemoryError(), "OUT_OF_MEMORY"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "GENERATION_FAILED"),
    ],
)
def test_gpu_failures_are_the_jobs(pipe, refuse, error, code):
    """Out of memory and CUDA errors are no matter of long prompts: they fail the job."""
    refuse(lambda ids: len(ids) > 3, error)
    job = {"prompt": f"{LONG}{code}{error}", "negative_prompt": LONG + "fog"}  # each alone would fit
    answer = handler.handler({"input": {**job, "width": 256, "height": 256, "steps": 1}})
    assert answer["code"] == code and answer.get("refresh_worker", False) == (code == "GENERATION_FAILED")


def test_failed_chunks_are_tried_again(encoder, rows, refuse):
    """A prompt that fell back is not remembered as seen."""
    failing = [True]
    refuse(lambda ids: failing[0] and len(ids) > 1, RuntimeError("no"))
    assert encode(encoder, LONG).warnings
    failing[0] = False
    found = encode(encoder, LONG)
    assert found.prompt.chunks == 3 and not found.warnings
