"""Parts of small pipelines, of diffusers' and transformers' own classes: tokenizers of letters, and random weights.

A part is always made with the same weights, so that all ranks have the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

__all__ = ["clip_encoder", "clip_tokenizer", "drawn", "letters_tokenizer", "t5_encoder", "t5_tokenizer"]

Made = TypeVar("Made", bound=nn.Module)

HEADS = 2
LAYERS = 2


def drawn(kind: Callable[..., Made], seed: int = 0, **config: Any) -> Made:
    """A model of diffusers, with the weights that its class draws for a new one."""
    return _drawn(functools.partial(kind, **config), seed)


def _drawn(make: Callable[[], Made], seed: int = 0) -> Made:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = make()
    return made.eval().requires_grad_(False)


# Tokenizers: a token for each letter


def t5_tokenizer(tokens: int) -> transformers.T5Tokenizer:
    """T5's, for prompts of so many tokens at most."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    letters = [(chr(code), -8.0) for code in range(33, 127)]
    return transformers.T5Tokenizer(vocab=[*specials, *letters], extra_ids=0, model_max_length=tokens)


def clip_tokenizer(tokens: int) -> transformers.CLIPTokenizer:
    """CLIP's, for prompts of so many tokens at most."""
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab=_numbered(pieces), merges=[], model_max_length=tokens)


def letters_tokenizer(kind: Callable[..., Any], specials: list[str], **how: Any) -> Any:
    """Of a language model; those tokens come first."""
    return kind(vocab=_numbered([*specials, *sorted(ByteLevel.alphabet())]), merges=[], **how)


def _numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(pieces)}


# Text encoders


def t5_encoder(
    tokenizer: Any, width: int, kind: type[Made] = transformers.T5EncoderModel, config: Any = transformers.T5Config
) -> Made:
    """T5's, or one that is like it."""
    return _drawn(
        lambda: kind(
            config(
                vocab_size=len(tokenizer),
                d_model=width,
                d_kv=width // HEADS,
                d_ff=2 * width,
                num_layers=LAYERS,
                num_heads=HEADS,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
    )


def clip_encoder(tokenizer: Any, width: int, kind: type[Made] = transformers.CLIPTextModel) -> Made:
    """CLIP's text model."""
    return _drawn(
        lambda: kind(
            transformers.CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=width,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                max_position_embeddings=tokenizer.model_max_length,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    )
