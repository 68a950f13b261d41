"""build_77_token_tensor: how the states of several chunks become a window of 77, by the contract and by an oracle."""

import math
import time

import oracle
import pytest
import torch

import handler

blend = handler.build_77_token_tensor


def random_chunks(n: int, width: int = 8, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(n, 1, 77, width, generator=torch.Generator().manual_seed(seed)))


def worded_chunks(n: int, width: int, seed: int = 0) -> list[torch.Tensor]:
    """Chunks of 20 words that come again and again, a little different each time, as commas do in a prompt."""
    dice = torch.Generator().manual_seed(seed)
    words = torch.randn(20, width, generator=dice)
    drawn = words[torch.randint(20, (n, 1, 77), generator=dice)]
    return list(drawn + 0.2 * torch.randn(n, 1, 77, width, generator=dice))


def real_states(chunks: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
    """Each chunk's tokens and its EOS, (N, D)."""
    return torch.cat([chunk[0, 1 : count + 2] for chunk, count in zip(chunks, counts, strict=True)])


@pytest.mark.parametrize("kind", [random_chunks, worded_chunks])
@pytest.mark.parametrize(
    ("n", "width", "counts"),
    [
        *((2, 8, None), (2, 96, [75, 75]), (3, 96, [75, 40, 3]), (5, 8, None), (5, 96, [75, 75, 1, 0, 75])),
        *((8, 32, [75] * 7 + [9]), (10, 96, None), (2, 96, [38, 37])),
    ],
)
def test_the_oracle(kind, n, width, counts):
    """What the contract says, done plainly in float64, gives the same to 1e-5."""
    chunks = kind(n, width, seed=n + width)
    expected = oracle.blend([chunk[0] for chunk in chunks], counts or [75] * n)
    assert oracle.relative(blend(chunks, counts), expected[None]) < 1e-5


@pytest.mark.parametrize("counts", [None, [75], [3], [0]])
def test_one_chunk_comes_back_unchanged(counts):
    """With and without counts."""
    (chunk,) = random_chunks(1)
    assert torch.equal(blend([chunk], counts), chunk)


def test_the_first_position_is_the_first_bos():
    """It is never merged, not even with states that are all like it; the other chunks' BOS count for nothing."""
    chunks = random_chunks(3)
    for chunk in chunks:
        chunk[:, 1:] = 2 * chunks[0][:, :1] + 0.01 * chunk[:, 1:]
    blended = blend(chunks)
    assert torch.equal(blended[:, 0], chunks[0][:, 0])
    chunks[1][:, 0], chunks[2][:, 0] = 5, -5
    assert torch.equal(blend(chunks), blended)


@pytest.mark.parametrize("counts", [[2, 1], [0, 0, 0], [37, 37], [20, 30, 0], [73, 0]])
def test_what_fits_is_kept(counts):
    """Up to 76 real states stay as they are, in the prompt's order; the first chunk's padding fills up."""
    chunks = random_chunks(len(counts))
    real = real_states(chunks, counts)
    assert len(real) <= 76
    expected = torch.cat([chunks[0][0, :1], real, chunks[0][0, counts[0] + 2 :]])[:77]
    assert torch.equal(blend(chunks, counts)[0], expected)


def test_every_state_is_in_one_mean():
    """The 76 are means of a partition of all real states, in the order of each one's first: times their sizes they sum
    up to what went in."""
    chunks, counts = worded_chunks(4, 16), [75, 60, 75, 12]
    total = sum(counts) + len(counts)
    marked, row = [], 0
    for chunk, count in zip(chunks, counts, strict=True):  # a channel for each state shows where it went
        marks = torch.zeros(1, 77, total)
        marks[0, 1 : count + 2] = 0.001 * torch.eye(total)[row : row + count + 1]
        marked.append(torch.cat([chunk, marks], dim=-1))
        row += count + 1
    blended = blend(marked, counts)[0, 1:]
    shares = blended[:, 16:]
    assert ((shares > 0).sum(dim=0) == 1).all()
    sizes = (shares > 0).sum(dim=1)
    assert sizes.sum() == total and sizes.max() > 5
    firsts = (shares > 0).float().argmax(dim=1)
    assert (firsts[1:] > firsts[:-1]).all()
    summed = (blended * sizes.unsqueeze(1)).sum(dim=0)
    assert oracle.relative(summed, real_states(marked, counts).sum(dim=0)) < 1e-5


def test_the_most_alike_are_merged():
    """Of 77 states the two of one direction become their mean, at the first one's place; the others stay."""
    chunks, counts = random_chunks(2), [37, 38]
    chunks[1][0, 20] = 2 * chunks[0][0, 9]
    real = real_states(chunks, counts)
    expected = torch.cat([real[:8], 1.5 * real[8:9], real[9 : 38 + 19], real[38 + 20 :]])
    assert oracle.relative(blend(chunks, counts)[0, 1:], expected) < 1e-6


def test_a_mean_counts_for_as_many_as_it_stands_for():
    """Of three states of one direction, of lengths 1, 2 and 6, comes 3; not the mean of a mean."""
    angles = (0.004 * 1.05 ** torch.arange(75.0)).cumsum(0)  # each is most like the one before it: hardly any pairs
    fan = torch.stack([angles.cos(), angles.sin(), torch.zeros(75)], dim=1)
    up = torch.tensor([[0.0, 0.0, 1.0]])
    real = torch.cat([fan[:10], up, fan[10:40], 2 * up, fan[40:], 6 * up])
    chunks = list(torch.ones(2, 1, 77, 3))
    chunks[0][0, 1:40], chunks[1][0, 1:40] = real[:39], real[39:]
    expected = torch.cat([fan[:10], 3 * up, fan[10:]])
    assert oracle.relative(blend(chunks, [38, 38])[0, 1:], expected) < 1e-6


def test_a_chunk_given_twice():
    """Is that chunk: each state is merged with its twin."""
    (chunk,) = random_chunks(1, 32)
    assert oracle.relative(blend([chunk] * 2), chunk) < 1e-6


def test_every_state_counts():
    """Another state at any real position of any chunk changes the tensor; the same ones give the same, bit for bit."""
    chunks, counts = worded_chunks(3, 16), [75, 50, 20]
    plain = blend(chunks, counts)
    assert torch.equal(blend([chunk.clone() for chunk in chunks], list(counts)), plain)
    other = torch.randn(16, generator=torch.Generator().manual_seed(9))
    for i, count in enumerate(counts):
        for position in range(1, count + 2):
            changed = [chunk.clone() for chunk in chunks]
            changed[i][0, position] = other
            assert oracle.relative(blend(changed, counts), plain) > 1e-3, (i, position)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Chunks of half precision are blended in float32, and rounded once."""
    chunks = [chunk.to(dtype) for chunk in worded_chunks(4, 32)]
    blended = blend(chunks, [75, 75, 30, 75])
    assert blended.dtype == dtype
    assert torch.equal(blended, blend([chunk.float() for chunk in chunks], [75, 75, 30, 75]).to(dtype))


def test_large_values_do_not_overflow():
    """States of 40,000, of which float16 cannot hold the sum of two, are 40,000."""
    blended = blend([torch.full((1, 77, 4), 40_000.0, dtype=torch.float16)] * 2)
    assert blended.dtype == torch.float16 and (blended == 40_000).all()


@pytest.mark.parametrize("zeros", ["all", "one chunk", "one state"])
def test_zeros(zeros):
    """States of no direction are like no other, and harm nothing."""
    chunks = random_chunks(3)
    if zeros == "all":
        assert not blend([torch.zeros(1, 77, 8)] * 3).any()
        return
    chunks[1][0, 1 if zeros == "one state" else slice(None)] = 0
    if zeros == "one state":
        chunks[1][0, 2:] = random_chunks(1, seed=5)[0][0, 2:]
    blended = blend(chunks)
    assert blended.shape == (1, 77, 8) and blended.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["one value", "one state", "one chunk", "all"])
@pytest.mark.parametrize("counts", [None, [75, 75, 75], [75, 3, 0], [1, 1, 1]])
def test_broken_states_end(value, where, counts):
    """NaN and infinity in states end in a tensor that shows them, not in an endless loop."""
    chunks = random_chunks(3)
    places = {"one value": (0, 1, 0), "one state": (0, 1), "one chunk": 0, "all": 0}
    chunks[1][places[where]] = value
    if where == "all":
        for chunk in chunks:
            chunk[:] = value
    blended = blend(chunks, counts)
    assert blended.shape == (1, 77, 8) and not blended.isfinite().all()
    assert blended.isnan().any() or not math.isnan(value)


@pytest.mark.parametrize(
    ("chunks", "counts"),
    [
        ([], None),
        ([torch.ones(1, 77, 4)] * 2, [1]),
        ([torch.ones(1, 77, 4)] * 2, [1, 2, 3]),
        ([torch.ones(1, 77, 4), torch.ones(1, 77, 5)], None),
        ([torch.ones(2, 77, 4)] * 2, None),
        ([torch.ones(77, 4)] * 2, None),
        ([torch.ones(1, 77)] * 2, None),
        ([torch.ones(1, 50, 4)] * 2, None),
        ([torch.ones(1, 77, 4)] * 2, [75, 76]),
        ([torch.ones(1, 77, 4)] * 2, [75, -1]),
    ],
)
def test_what_does_not_fit_is_refused(chunks, counts):
    """No chunks, another number of counts, chunks of other shapes than (1, 77, D), counts that no chunk can have."""
    with pytest.raises(ValueError, match="chunk"):
        blend(chunks, counts)


def test_thousands_of_equal_states_end_at_once():
    """A thousand BREAKs are a thousand equal chunks: their states stay what they are, and take no thousand rounds."""
    chunk = torch.randn(1, 77, 8, generator=torch.Generator().manual_seed(1))
    blended = blend([chunk] * 1_100, [1] * 1_100)[0]
    assert torch.equal(blended[0], chunk[0, 0])
    assert all(min((state - own).abs().max() for own in chunk[0, 1:3]) < 1e-3 for state in blended[1:])
    started = time.process_time()
    blend([chunk] * 1_100, [1] * 1_100)
    assert time.process_time() - started < 20


def test_more_states_than_are_compared_at_once():
    """Of 4,560 states, 40 words each said a little differently, every word is left as a state of its own."""
    dice = torch.Generator().manual_seed(3)
    words = torch.randn(40, 32, generator=dice)
    drawn = words[torch.randint(40, (60, 1, 77), generator=dice)]
    blended = blend(list(drawn + 0.01 * torch.randn(60, 1, 77, 32, generator=dice)))[0, 1:]
    alike = torch.nn.functional.normalize(words) @ torch.nn.functional.normalize(blended).T
    assert (alike.amax(dim=1) > 0.999).all()


@pytest.mark.parametrize("count", [3, 1_100])
def test_states_of_an_encoder_with_gradients(count):
    """Blended as others are, few or thousands, and the gradient reaches every chunk."""
    chunks = torch.randn(count, 1, 77, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    counts = [75 if count == 3 else 1] * count
    blended = blend([*chunks], counts)
    assert torch.equal(blended, blend([*chunks.detach()], counts))
    blended.sum().backward()
    assert (chunks.grad.flatten(1) != 0).any(dim=1).all()
