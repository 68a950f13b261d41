"""What prompts mean, said a second time and another way than in handler.py: character by character, chunk by chunk.

Slow and plain, for the tests to compare with. It shares no code with handler.py, reads ids from the tokenizers' own
__call__, and sends one chunk at a time through the text encoders. `parse` is A1111's prompt language, `chunks` the
contract's chunking, `conditioning` the tensors of both prompts.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import handler

TOKENS = 75
ENDS = ",.!?…，。！？、"
CLOSERS = "\"')]”’»」』"


# ---------------------------------------------------------------------------------------------------------------------
# the language


@dataclass
class Char:
    """A character that is left when the syntax is taken out; "" for a lone backslash, None for a BREAK."""

    text: str | None
    weight: float = 1.0


def weight_at(prompt: str, at: int) -> tuple[float, int] | None:
    """The number of a ":1.3)" that begins at prompt[at], and where it ends."""
    end = at + 1
    while end < len(prompt) and prompt[end].isspace():
        end += 1
    start = end
    while end < len(prompt) and (prompt[end] in ".+-" or prompt[end].isdecimal()):
        end += 1
    number = prompt[start:end]
    while end < len(prompt) and prompt[end].isspace():
        end += 1
    if prompt[end : end + 1] != ")" or number.count(".") > 1 or any(sign in number[1:] for sign in "+-"):
        return None
    return (float(number), end + 1) if any(c.isdecimal() for c in number) else None


def is_break(prompt: str, at: int) -> bool:
    """Whether the word BREAK stands alone at prompt[at]."""
    around = prompt[max(at - 1, 0) : at] + prompt[at + 5 : at + 6]
    return prompt.startswith("BREAK", at) and not any(c.isalnum() or c == "_" for c in around)


def parse(prompt: str) -> list[tuple[str, float] | None]:
    """Texts with weights, None for a BREAK."""
    chars: list[Char] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for char in chars[start:]:
            char.weight *= factor

    at = 0
    while at < len(prompt):
        char, end = prompt[at], at + 1
        weight = weight_at(prompt, at) if char == ":" else None
        if char == "\\":
            escaped = prompt[at + 1 : at + 2] in tuple("()[]\\")
            chars.append(Char(prompt[at + 1] if escaped else ""))
            end += escaped
        elif is_break(prompt, at):
            chars.append(Char(None))
            end += 4
        elif char in "([":
            opened[char].append(len(chars))
        elif weight:
            end = weight[1]
            if opened["("]:
                multiply(opened["("].pop(), weight[0])
            else:  # text, bracket and all
                chars += [Char(c) for c in prompt[at:end]]
        elif char == ")" and opened["("]:
            multiply(opened["("].pop(), 1.1)
        elif char == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / 1.1)
        else:
            chars.append(Char(char))
        at = end
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        for start in opened[bracket]:
            multiply(start, factor)
    return join(chars)


def largest_weight(prompt: str) -> float:
    """The largest of a prompt's factors and of their products, without sign: a limit holds for all."""
    factors = [abs(weight_at(prompt, at)[0]) for at, c in enumerate(prompt) if c == ":" and weight_at(prompt, at)]
    return max([0.0, *factors, *(abs(part[1]) for part in parse(prompt) if part)])


def join(chars: list[Char]) -> list[tuple[str, float] | None]:
    """Neighbours of one weight make up a text."""
    parts: list[tuple[str, float] | None] = []
    for char in chars:
        if char.text is None:
            parts.append(None)
        elif parts and parts[-1] is not None and parts[-1][1] == char.weight:
            parts[-1] = parts[-1][0] + char.text, char.weight
        else:
            parts.append((char.text, char.weight))
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# chunks

Token = tuple[int, float]  # id, weight


@dataclass
class Field:
    """Text up to the next place where a cut may be, with its tokens for both tokenizers."""

    text: str
    tokens: tuple[list[Token], list[Token]]

    @property
    def size(self) -> int:
        return max(len(tokens) for tokens in self.tokens)

    @property
    def ends_clause(self) -> bool:
        return self.text.strip().rstrip(CLOSERS)[-1:] in tuple(ENDS)


def own_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def fields(text: str) -> list[str]:
    """Words with the space behind them; "a,b" is two."""
    found = [""]
    for char, following in zip(text, text[1:] + " ", strict=True):
        found[-1] += char
        letter = unicodedata.category(following)[0] == "L"
        if (char.isspace() and not following.isspace()) or (char == "," and letter):
            found.append("")
    return [field for field in found if field]


def chunks(pipe: Any, prompt: str) -> list[list[Field]]:
    """At most 75 tokens each; no field of the callers' prompts is longer than that."""
    filled: list[list[Field]] = [[]]
    for part in parse(prompt):
        if part is None:
            filled.append([])
            continue
        text, weight = part
        for field in fields(text):
            ids = [own_ids(tokenizer, field) for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)]
            add(filled, Field(field, tuple([(i, weight) for i in row] for row in ids)))
    for chunk in filled:
        assert sum(field.size for field in chunk) <= TOKENS
    if len(filled) > 1 and not any(field.size for field in filled[-1]):
        filled.pop()
    return filled


def add(filled: list[list[Field]], field: Field) -> None:
    """Puts a field into the last chunk, or starts one, back at the last comma where that is near."""
    if sum(f.size for f in filled[-1]) + field.size <= TOKENS:
        filled[-1].append(field)
        return
    full = filled[-1]
    cuts = [i + 1 for i, f in enumerate(full) if f.ends_clause]
    moved = full[cuts[-1] :] if cuts else []
    tokens = sum(f.size for f in moved)
    if tokens >= 20 or tokens + field.size > TOKENS:
        moved = []
    filled[-1] = full[: len(full) - len(moved)]
    filled.append([*moved, field])


# ---------------------------------------------------------------------------------------------------------------------
# tensors


def encode_chunk(
    pipe: Any, chunk: list[Field], clip_skip: int, emphasis: str
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Hidden states of both encoders (77, 2048), weighted token by token; pooled (1, 1280); either encoder's tokens."""
    states, counts, pooled = [], [], None
    for k, tokenizer in enumerate((pipe.tokenizer, pipe.tokenizer_2)):
        tokens = [token for field in chunk for token in field.tokens[k]][:TOKENS]
        ids = [tokenizer.bos_token_id, *(i for i, _ in tokens), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (77 - len(ids))
        encoder = (pipe.text_encoder, pipe.text_encoder_2)[k]
        with torch.no_grad():
            output = encoder(torch.tensor([ids]), output_hidden_states=True)
        plain = output.hidden_states[len(output.hidden_states) - clip_skip][0]
        weighted = plain.clone()
        for position, (_, weight) in enumerate(tokens, start=1):
            weighted[position] *= weight
        if emphasis == "original":  # z·w·mean(z)/mean(z·w)
            weighted = weighted * (plain.double().mean() / weighted.double().mean()).float()
        states.append(weighted)
        counts.append(len(tokens))
        pooled = output.text_embeds if k else None
    return torch.cat(states, dim=-1), pooled, counts


def merge(states: torch.Tensor, most: int) -> tuple[torch.Tensor, list[int]]:
    """(N, D) -> (most, D) means of like states, and how many each stands for, round by round in float64: of the pairs
    that are each other's most alike, the most alike quarter (one at least, no more than needed) become one."""
    groups = [[row] for row in range(len(states))]
    exact = states.double()
    while len(groups) > most:
        means = torch.stack([exact[group].mean(dim=0) for group in groups])
        directions = means / means.norm(dim=1, keepdim=True).clamp_min(1e-30)  # of weight 0: like no other
        alike = directions @ directions.T
        alike.fill_diagonal_(-math.inf)
        nearest = alike.argmax(dim=1).tolist()
        pairs = [(a, b) for a, b in enumerate(nearest) if a < b and nearest[b] == a]
        pairs.sort(key=lambda pair: -alike[pair])
        for a, b in pairs[: min(max(len(pairs) // 4, 1), len(groups) - most)]:
            groups[a], groups[b] = groups[a] + groups[b], []
        groups = [group for group in groups if group]
    return torch.stack([exact[group].mean(dim=0) for group in groups]).to(states.dtype), [len(g) for g in groups]


def blend(chunks: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
    """(77, D) of chunks (77, D): the first BOS, the merged real states, padding."""
    if len(chunks) == 1:
        return chunks[0]
    real = torch.cat([chunk[1 : count + 2] for chunk, count in zip(chunks, counts, strict=True)])
    padding = torch.cat([chunk[count + 2 :] for chunk, count in zip(chunks, counts, strict=True)])
    return torch.cat([chunks[0][:1], merge(real, 76)[0], padding])[:77]


def side(pipe: Any, prompt: str, mode: str, *options: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """One prompt's (1, 77·n, 2048), (1, 1280) and number of chunks. options: clip_skip, emphasis."""
    hidden, pooled, counts = zip(*(encode_chunk(pipe, chunk, *options) for chunk in chunks(pipe, prompt)), strict=True)
    if mode == "concat":
        return torch.cat(hidden)[None], pooled[0], len(hidden)
    # by the worker's own function, which test_blend proves: of this model's states, which are hardly unlike, rounding
    # decides which are the most alike
    width = pipe.text_encoder.config.hidden_size
    sides = [[chunk[:, :width] for chunk in hidden], [chunk[:, width:] for chunk in hidden]]
    shared = [shared_eos(side, tokens) for side, tokens in zip(sides, zip(*counts, strict=True), strict=True)]
    joined = [torch.cat(both, dim=-1)[None] for both in zip(*shared, strict=True)]
    blended = handler.build_77_token_tensor(joined, [*map(max, counts)])
    return blended, sum(pooled) / len(pooled), len(hidden)


def shared_eos(chunks: Sequence[torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor]:
    """Chunks (..., 77, D) with the mean of all EOS states in place of each; one chunk stays as it is."""
    mean = sum(chunk[..., count + 1, :] for chunk, count in zip(chunks, counts, strict=True)) / len(chunks)
    shared = [chunk.clone() for chunk in chunks]
    for chunk, count in zip(shared, counts, strict=True):
        chunk[..., count + 1, :] = mean
    return shared


def conditioning(
    pipe: Any, prompt: str, negative: str, mode: str, clip_skip: int, emphasis: str
) -> tuple[torch.Tensor, ...]:
    """prompt_embeds, negative_prompt_embeds and both pooled ones, in the order of diffusers' encode_prompt."""
    embeds, pooled, n = side(pipe, prompt, mode, clip_skip, emphasis)
    if not negative.strip():
        return embeds, torch.zeros_like(embeds), pooled, torch.zeros_like(pooled)
    negative_embeds, negative_pooled, m = side(pipe, negative, mode, clip_skip, emphasis)
    if mode != "concat" or n == m:
        return embeds, negative_embeds, pooled, negative_pooled
    length = next(length for length in range(1, n * m + 1) if length % n == length % m == 0)
    if length <= 4 * max(n, m):
        filled = [torch.cat([e] * (77 * length // e.shape[1]), dim=1) for e in (embeds, negative_embeds)]
    else:
        empty, length = side(pipe, "", mode, clip_skip, emphasis)[0], max(n, m)
        filled = [torch.cat([e] + [empty] * (length - e.shape[1] // 77), dim=1) for e in (embeds, negative_embeds)]
    return *filled, pooled, negative_pooled


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return math.inf if a.isnan().any() else float((a - b).abs().max() / b.abs().max().clamp(min=1e-20))
