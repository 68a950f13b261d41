"""The model that draws: SDXL's classes with small dimensions, and a vocabulary of which only a few rows were trained.

The captions use some ninety of CLIP's 49,408 tokens. Their embedding rows are trained; every other row is random from
FROZEN_SEED, in training and afterwards, so that the committed weights stay small.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
import world
from torch import nn
from torch.nn import functional
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from drawing import scenes

SIZE = "drawing"
"""The name of these dimensions in world.DIMENSIONS; world's functions then work on this model."""

DIMENSIONS: dict[str, Any] = {
    "unet": {
        "block_out_channels": [32, 64, 96],
        "attention_head_dim": [1, 2, 3],
        "transformer_layers_per_block": [1, 1, 1],
        "cross_attention_dim": 64 + 128,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 128 + 6 * 8,
        "norm_num_groups": 8,
        "sample_size": 32,
    },
    "vae": {
        "block_out_channels": [12, 24, 32, 32],
        "layers_per_block": 1,
        "norm_num_groups": 1,
        "sample_size": 256,
    },
    "text_encoder": {"hidden_size": 64, "heads": 2, "layers": 3},
    "text_encoder_2": {"hidden_size": 128, "heads": 2, "layers": 3},
}
world.DIMENSIONS[SIZE] = DIMENSIONS

FROZEN_SEED = {"text_encoder": 100, "text_encoder_2": 101}
VOCABULARY, BOS, EOS, PAD_2 = 49408, 49406, 49407, 0
"""Token ids as CLIP has them; tokenizer_2 of SDXL pads with "!", which is 0."""

MAX_TOKENS = 75
"""What fits between BOS and EOS."""

# ---------------------------------------------------------------------------------------------------------------------
# tokens


@lru_cache
def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, from its real vocabulary."""
    with TemporaryDirectory() as folder:
        world.write_tokenizer(Path(folder), "<|endoftext|>")
        return CLIPTokenizer.from_pretrained(folder)


@lru_cache(maxsize=100_000)
def word_ids(word: str) -> tuple[int, ...]:
    """Token ids of one word or mark."""
    return tuple(tokenizer().convert_tokens_to_ids(tokenizer().tokenize(word)))


def token_ids(text: str) -> list[int]:
    """Token ids of a caption, as CLIPTokenizer gives them, much faster."""
    return [i for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()) for i in word_ids(word)]


@lru_cache
def trained_ids() -> tuple[int, ...]:
    """The tokens whose rows are trained: all that captions without random words use, and the special ones."""
    rng = random.Random(0)
    ids = {BOS, EOS, PAD_2}
    for _ in range(4000):
        ids.update(token_ids(scenes.caption(rng, scenes.random_scene(rng), [])))
    return tuple(sorted(ids))


@lru_cache
def random_words() -> list[str]:
    """Words for decoration that means nothing: one frozen token each."""
    words = (token.removesuffix("</w>") for token in tokenizer().get_vocab() if token.endswith("</w>"))
    known = set(trained_ids())
    return [
        w for w in words if re.fullmatch("[a-z]{3,10}", w) and len(word_ids(w)) == 1 and word_ids(w)[0] not in known
    ]


def frozen_rows(component: str) -> torch.Tensor:
    """(49408, hidden) random embedding rows of a text encoder."""
    width = DIMENSIONS[component]["hidden_size"]
    generator = torch.Generator().manual_seed(FROZEN_SEED[component])
    return torch.randn(VOCABULARY, width, generator=generator) * 0.5


class TokenRows(nn.Module):
    """A token embedding of which only the rows of trained_ids() are parameters."""

    def __init__(self, component: str) -> None:
        super().__init__()
        ids = torch.tensor(trained_ids())
        row_of = torch.full((VOCABULARY,), -1)
        row_of[ids] = torch.arange(len(ids))
        self.register_buffer("weight", frozen_rows(component), persistent=False)
        self.register_buffer("row_of", row_of, persistent=False)
        self.rows = nn.Parameter(self.weight[ids].clone())  # (n_trained, hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(n, 77) ids -> (n, 77, hidden)."""
        row = self.row_of[ids]
        return torch.where((row >= 0)[..., None], functional.embedding(row.clamp(min=0), self.rows), self.weight[ids])

    def full(self) -> torch.Tensor:
        """(49408, hidden): frozen and trained rows."""
        rows = self.weight.clone()
        rows[list(trained_ids())] = self.rows.detach().to(rows.dtype)
        return rows


# ---------------------------------------------------------------------------------------------------------------------
# models


def build(component: str) -> nn.Module:
    """One component with fresh weights; the text encoders with TokenRows."""
    config = world.configs(SIZE)[component]
    if component in ("unet", "vae"):
        return getattr(diffusers, config["_class_name"]).from_config(config)
    model = getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))
    model.text_model.embeddings.token_embedding = TokenRows(component)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.15)
    return model


class Drawer(nn.Module):
    """Both text encoders and the UNet: what is trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = build("text_encoder")
        self.text_encoder_2 = build("text_encoder_2")
        self.unet = build("unet")
        with torch.no_grad():  # blocks begin as small changes to their input
            for name, module in self.unet.named_modules():
                if name.endswith((".conv2", ".proj_out")) or name == "conv_out":
                    module.weight.mul_(0.05)
                    module.bias.zero_()

    def encode(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of n prompts, up to 75 each -> hidden states (n, 77, 192), pooled vectors (n, 128)."""
        ids = torch.full((len(prompts), MAX_TOKENS + 2), EOS)
        ids_2 = torch.full((len(prompts), MAX_TOKENS + 2), PAD_2)
        for row, prompt in enumerate(prompts):
            whole = torch.tensor([BOS, *prompt[:MAX_TOKENS], EOS])
            ids[row, : len(whole)] = ids_2[row, : len(whole)] = whole
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return hidden, second.text_embeds


def load_drawer(path: Path) -> Drawer:
    """The model whose weights train.py wrote."""
    drawer = Drawer()
    drawer.load_state_dict(torch.load(path))
    return drawer


def latents_of(pictures: torch.Tensor) -> torch.Tensor:
    """(n, h, w, 3) uint8 -> (n, 4, h/8, w/8): mean colours of 8x8 pixels, then their mean; about unit variance."""
    colours = functional.avg_pool2d(pictures.permute(0, 3, 1, 2).float(), 8) / 127.5 - 1
    return torch.cat([colours, colours.mean(1, keepdim=True) * 1.2], 1) * 1.3


def colours_of(latents: torch.Tensor) -> torch.Tensor:
    """(n, 4, h, w) -> (n, h, w, 3) uint8: the mean colours that latents_of() put into them."""
    return (((latents[:, :3] / 1.3).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
