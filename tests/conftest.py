"""Tiny random models of real architectures, a tiny tokenizer, and text; nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports the hub client: no test asks a hub, and asking one takes its time.
os.environ["HF_HUB_OFFLINE"] = "1"
# Several test processes of several threads each get in each other's way: every product waits for its slowest thread.
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if PARALLEL:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from pruning import Segment

if PARALLEL:
    torch.set_num_threads(1)
settings.register_profile("unhurried", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("unhurried")

#: The files that take longest, longest first: started last, one of them would keep a single process busy at the end.
LONGEST = (
    "test_notebooks",
    "test_run",
    "test_embedded_model",
    "test_other_studies",
    "test_sweep",
    "test_diagnose",
    "test_methods",
    "test_plan",
    "test_prune",
)
_SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SPECIAL: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": {"head_dim": 8},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "gpt2": {"n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "mlp_only_layers": [1],
    },
    "mt5": {"d_kv": 8, "d_ff": 48, "num_hidden_layers": 2, "num_decoder_layers": 2, "decoder_start_token_id": 0},
}
_SPECIAL["t5"] = _SPECIAL["umt5"] = _SPECIAL["mt5"]
#: Those whose heads all have keys and values of their own.
_MULTI_HEAD = ("gpt_neox", "bloom", "opt", "gpt2", "mt5", "t5", "umt5")
ARCHITECTURES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "cohere",
    "cohere2",
    "phi3",
    "gpt_neox",
    "bloom",
    "opt",
    "gpt2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "mt5",
]
DECODERS = [kind for kind in ARCHITECTURES if kind != "mt5"]


#: Not a test, and it may be imported once only.
collect_ignore = ["standin.py"]


def tiny_model(kind: str = "llama", seed: int = 0, **settings: Any) -> Any:
    """Return a random model of three blocks; weights large enough for its states to differ between tokens.

    Encoder-decoders have two blocks and two. BLOOM's MLP has four times the hidden size by definition; else it has 48
    neurons, or 24 in each of four experts.
    """
    torch.manual_seed(seed)
    if kind == "gemma3":
        from transformers import (
            Gemma3Config,
            Gemma3ForConditionalGeneration,
            Gemma3TextConfig,
            SiglipVisionConfig,
        )

        text = _SMALL | _SPECIAL["gemma3_text"]
        vision = SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=14,
            patch_size=7,
        )
        model: Any = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=Gemma3TextConfig(**text), vision_config=vision, mm_tokens_per_image=4)
        )
    else:
        values = _SMALL | _SPECIAL.get(kind, {}) | settings
        if kind in _MULTI_HEAD:
            del values["num_key_value_heads"]
        config = AutoConfig.for_model(kind, **values)
        model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            elif "norm" in name or ".ln_" in name:
                parameter.normal_(1, 0.1)
            else:
                parameter.normal_(0, 0.1)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with a BOS token before every text, as Gemma's and Llama's have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {letter: i + 3 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; several processes take files in this order (see the Makefile)."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(Path(item.path).stem, len(place)))


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture
def make_model() -> Callable[..., Any]:
    return tiny_model


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def segments() -> list[Segment]:
    texts = [
        "A short one.",
        "Something a little longer than that.",
        "Habari ya asubuhi, rafiki?",
        "我们走吧。",
        "Ja.",
    ]
    return [Segment(str(i), text) for i, text in enumerate(texts)]


@pytest.fixture
def calibration_ids() -> torch.Tensor:
    return torch.randint(3, 250, (5, 16), generator=torch.Generator().manual_seed(7))
