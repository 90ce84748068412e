"""The tidy schema: every frame, its columns and its metrics with unit and definition, checked on write and read.

Long format, one observation a row. The first columns say which model was measured, the next ones where, the last ones
what: ``metric, value`` and, where the value is an estimate, ``low, high`` (95 % interval) and ``n``; where two
calibration sets are compared also
``draws``, ``df``, ``p_value`` and ``p_adjusted`` (see :mod:`analysis.metrics.contrasts`). Where two draws of
calibration text are compared, ``shared_text`` is the share of their tokens that they have in common; of a contrast, the
largest such share among the draws of one of its sets.

``bits`` is the size of the projections in a variant's scope in bits a weight, by which pruning and quantization can be
compared (:meth:`pruning.Variant.bits`): 16 for a weight that is kept (also where models compute in float32), 1 for the
mask, or log2 C(m, n) / m for an n:m mask (none for whole neurons and heads); for a quantized weight the bits of its
code, and for every group 16 for the scale and as many as a code has for the zero point. The dense model has 16.
``item_share`` is the share of a calibration set's sequences that are items (prompt and right answer), 0 for ordinary
text alone: sets are compared at one share.
``pattern`` is ``4bit-g128`` for codes of 4 bits in groups of 128 inputs, ``4bit-row`` where a row has one scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

_WORD = pa.dictionary(pa.int32(), pa.string())
#: Every column that a frame may have, and its type.
COLUMNS: dict[str, pa.DataType] = {
    "model": _WORD,
    "method": _WORD,
    "sparsity": pa.float64(),
    "pattern": _WORD,
    "allocation": _WORD,
    "scope": _WORD,
    "propagation": _WORD,
    "item_share": pa.float64(),
    "bits": pa.float64(),
    "calibration": _WORD,
    "seed": pa.int32(),
    "language": _WORD,
    "source_language": _WORD,
    "task": _WORD,
    "category": _WORD,
    "part": _WORD,
    "kind": _WORD,
    "template": _WORD,
    "grade": pa.int32(),
    "domain": _WORD,
    "item": _WORD,
    "twin": _WORD,
    "choice": pa.int32(),
    "direction": _WORD,
    "component": _WORD,
    "layer": pa.int32(),
    "role": _WORD,
    "estimated_on": _WORD,
    "position": pa.int32(),
    "sample": _WORD,
    "masks": pa.int32(),
    "weight_share": pa.float64(),
    "rank": pa.int32(),
    "quantile": pa.float64(),
    "dense_firing": pa.float64(),
    "neuron": pa.int32(),
    "expert": pa.int32(),
    "lens": _WORD,
    "other_language": _WORD,
    "other_calibration": _WORD,
    "other_recipe": _WORD,
    "other_seed": pa.int32(),
    "contrast": _WORD,
    "other_category": _WORD,
    "at_chance": pa.bool_(),
    "shared_text": pa.float64(),
    "metric": _WORD,
    "value": pa.float64(),
    "low": pa.float64(),
    "high": pa.float64(),
    "n": pa.int64(),
    "draws": pa.int32(),
    "df": pa.float64(),
    "p_value": pa.float64(),
    "p_adjusted": pa.float64(),
}
#: The columns that say what was done to a model.
RECIPE_COLUMNS = ("model", "method", "sparsity", "pattern", "allocation", "scope", "propagation", "item_share")
#: The columns that say which model was measured.
VARIANT_COLUMNS = (*RECIPE_COLUMNS, "bits", "calibration", "seed")
#: Category of a diagnosis of text, which has no items, and of one of all items together.
TEXT, ALL = "text", "all"
#: Tokens of a language that an expert needs for its neurons' firing probabilities to be estimated: their standard error
#: is then at most 0.05. With fewer, rare firing looks specific to the languages in which it happened to be seen.
FEWEST_ROUTED = 100
_ESTIMATE = ("low", "high", "n")
_TEST = ("draws", "df", "p_value", "p_adjusted")


@dataclass(frozen=True)
class Metric:
    """Unit and definition of a metric."""

    unit: str
    definition: str


@dataclass(frozen=True)
class FrameSpec:
    """One frame.

    Attributes
    ----------
    keys
        Its key columns beside the variant's.
    metrics
        What it holds.
    estimates, tests
        Whether it has intervals, and tests of differences.
    on_demand
        Whether it is too large to lie in a study's folder, and is made in parts where it is wanted.
    """

    keys: tuple[str, ...]
    metrics: Mapping[str, Metric]
    estimates: bool = True
    tests: bool = False
    on_demand: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, in order."""
        measured = ("metric", "value", *(_ESTIMATE if self.estimates else ()), *(_TEST if self.tests else ()))
        return (*VARIANT_COLUMNS, *self.keys, *measured)

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema."""
        return pa.schema([(name, COLUMNS[name]) for name in self.columns])


_OVER = "95 % bootstrap interval over held-out segments"
_COUNTED = (
    "tokens that count: by default all but special ones and, except in an encoder, the first (BOS, if the tokenizer "
    "adds one)"
)
_OVER_SHARE = "95 % Wilson interval at the effective number of items, templates as clusters"
_OVER_CHANGE = "95 % interval of Agresti and Min at the effective number of items, templates as clusters"
_OVER_TEMPLATES = "95 % BCa bootstrap interval over templates (fewer than 20: jackknife, t quantiles)"
_JACKKNIFE = "95 % jackknife interval over held-out segments, translations left out together"
_VARIATION = "total variation distance, ½ Σ|p − q|, between"
_SPLIT = (
    "estimated without the bias of sampling noise: one half of the segments says which experts have more, the other "
    "how much more, so that it is 0 on average where nothing differs, and can be negative"
)
_MEAN_AND_JACKKNIFE = f"{_SPLIT}; no layer: mean over layers; {_JACKKNIFE}"
_DIAGNOSED = (
    "estimated_on: all questions, or one half of them, split by template; 95 % interval over templates (for text: over "
    "segments; empty where nothing varies)"
)
_PATCHED = (
    f"{_DIAGNOSED}. A cause has a position, its rank on the half that chose it, in the row of the other half; "
    "both: average of two such rows; all: on those that chose it too. Controls: mean, and in low and high the "
    "range, over n draws. sample: random if it was drawn to be patched exactly. agnostic_added: what restoring the "
    "language-agnostic part after the block brings back beyond the whole stream after the block before. "
    "residual_differing, residual_last, residual_elsewhere: the stream at some tokens of minimal pairs alone, over the "
    "items of these: of the words in which the two prompts differ; the last one of the prompt and those of the choice "
    "(in an encoder-decoder, what the decoder reads); the others of the prompt"
)
_SHARES = "only where that drop is significant on the same questions; intervals as above"
_RETRIEVAL = (
    "share of segments whose nearest neighbour in another language, by cosine similarity of {what}, is their "
    f"translation; mean over the other languages; chance: 1/n; {_OVER}"
)
_LENS = (
    "the prediction after a block: its states at sampled positions through the final norm and the head, as they are "
    "(lens: logit) or translated by an affine map fitted on the dense model (lens: tuned)"
)
_OVER_SAMPLED = "mean over the sampled positions, the same for all models; 95 % bootstrap interval over their segments"
_PAIRED = "mean over segments (paired) and draws; interval over both"
_DROPS = "mean over templates and draws; interval over both"
_BY_DRAW = "mean over calibration sets that both have, draws and segments or templates (paired); interval over both"
_MATCHED = "minus what the difference in log perplexity predicts (one slope a category and language, over all variants)"


def _decoding(part: str, what: str) -> dict[str, Metric]:
    before = {"dense_specific": "own_specific", "dense_agnostic": "own_agnostic", "transferred": "own_specific"}
    return {
        f"{part}_decoding": Metric(
            "",
            f"accuracy of a linear discriminant (shrunken covariance) that predicts a segment's language from {what}; "
            "subspace, discriminant and accuracy are of different held-out segments; chance: one over the number of "
            "languages; no language, no layer: over all; 95 % Wilson interval at the effective number of segments, "
            "translations as clusters",
        ),
        f"{part}_decoding_change": Metric(
            "",
            f"the same minus the dense model's {before.get(part, part)}_decoding, paired by segment; 95 % interval of "
            "Agresti and Min at the effective number of segments",
        ),
    }


FRAMES: dict[str, FrameSpec] = {
    "perplexity": FrameSpec(
        ("language",),
        {
            "perplexity": Metric(
                "",
                "exp of the mean negative log-likelihood per token, given the preceding tokens (encoder-decoders: of "
                f"the second half of each segment, with the first encoded); {_OVER}",
            ),
            "bits_per_byte": Metric(
                "bit/byte", f"negative log-likelihood in bits per byte of the UTF-8 text predicted; {_OVER}"
            ),
        },
    ),
    "signal": FrameSpec(
        ("language", "layer", "role"),
        {
            "error": Metric("", f"mean of ‖x − x̂‖² over {_COUNTED}; x: dense, x̂: pruned; {_OVER}"),
            "snr_db": Metric("dB", f"10·log10(Σ‖x‖² / Σ‖x − x̂‖²) over the same tokens; {_OVER}"),
        },
    ),
    "subspaces": FrameSpec(
        ("language", "layer", "rank"),
        {
            "specific_error": Metric(
                "",
                "Σ‖P(h − ĥ)‖² / Σ‖Ph‖²; h, ĥ: mean state of a segment in the dense and in the pruned model, over "
                f"{_COUNTED}; P: projection onto the language-specific subspace; {_OVER}",
            ),
            "agnostic_error": Metric("", f"the same for I − P, the language-agnostic part, mean included; {_OVER}"),
            "specific_error_centred": Metric(
                "",
                "Σ‖P(h − ĥ)‖² / Σ‖P(h − m)‖², m: the dense model's mean over languages; that is, relative to the "
                f"spread between languages; {_OVER}",
            ),
            "agnostic_error_centred": Metric(
                "",
                f"the same for I − P: relative to the spread of segments around the mean over languages; {_OVER}",
            ),
            "specific_error_per_dimension": Metric("", f"mean over segments of ‖P(h − ĥ)‖² / rank P; {_OVER}"),
            "agnostic_error_per_dimension": Metric(
                "", f"mean over segments of ‖(I − P)(h − ĥ)‖² / rank (I − P); {_OVER}"
            ),
            "specific_snr_db": Metric("dB", f"−10·log10 of specific_error; {_OVER}"),
            "agnostic_snr_db": Metric("dB", f"−10·log10 of agnostic_error; {_OVER}"),
            "agnostic_retrieval": Metric(
                "", _RETRIEVAL.format(what="the language-agnostic part of their mean states, centred over all segments")
            ),
            "whole_retrieval": Metric("", _RETRIEVAL.format(what="their whole mean states, centred over all segments")),
            "explained_share": Metric(
                "",
                "share of the between-language variance of the fitting text that a subspace of this rank explains "
                "(dense model; no language)",
            ),
        },
    ),
    "geometry": FrameSpec(
        ("language", "layer"),
        {
            "subspace_overlap": Metric(
                "",
                "mean cos² of the principal angles between this model's language-specific subspace (LSAR), fitted on "
                "one half of the held-out segments, and the dense model's, fitted on the other; mean over the two ways "
                f"to halve; no layer: mean over layers; {_JACKKNIFE}",
            ),
            "self_overlap": Metric(
                "",
                "the same between the two halves in this model: the ceiling that the number of segments sets; "
                f"{_JACKKNIFE}",
            ),
            "subspace_overlap_change": Metric(
                "", f"subspace_overlap minus the mean of the dense model's and this model's self_overlap; {_JACKKNIFE}"
            ),
            "language_variance_change": Metric(
                "",
                "variance between languages (squared distance of their means from the centre, as one half's means "
                "times the other's, so that noise adds nothing) relative to the dense model's, minus 1; no layer: mean "
                f"over layers; {_JACKKNIFE}",
            ),
            "overlap_chance": Metric("", "overlap expected of random subspaces: rank over hidden size (dense model)"),
            "largest_angle": Metric("degree", f"largest of these angles; {_JACKKNIFE}"),
            "cka": Metric(
                "",
                "linear CKA between the dense model's and this model's mean states of the segments of a language, with "
                f"the unbiased HSIC: 1: alike up to rotation and scale, 0: unrelated; {_JACKKNIFE}",
            ),
            **_decoding("whole", "its whole mean state"),
            **_decoding("own_specific", "its part in the model's own language-specific subspace"),
            **_decoding("own_agnostic", "the rest, outside the model's own subspace"),
            **_decoding("dense_specific", "its part in the dense model's subspace"),
            **_decoding("dense_agnostic", "the rest, outside the dense model's subspace"),
            **_decoding("transferred", "its part in the dense model's subspace, by the dense model's own discriminant"),
        },
    ),
    "routing": FrameSpec(
        ("language", "other_language", "layer", "expert"),
        {
            "share": Metric(
                "",
                f"share of the top-k slots that go to this expert; a token that counts ({_COUNTED}) has k, one for "
                f"each expert that it is routed to; {_OVER}",
            ),
            "shift": Metric(
                "",
                f"{_VARIATION} the shares of this model's experts and the dense model's, on the same tokens; "
                f"{_MEAN_AND_JACKKNIFE}",
            ),
            "moved": Metric(
                "",
                "share of the top-k slots whose expert the dense model does not choose for the same token; no layer: "
                f"mean over layers; {_OVER}",
            ),
            "language_distance": Metric(
                "",
                f"{_VARIATION} the shares of the experts in two languages; {_MEAN_AND_JACKKNIFE}",
            ),
        },
    ),
    "lens": FrameSpec(
        ("language", "layer", "lens", "other_language"),
        {
            "kl": Metric(
                "nat",
                f"KL(p ‖ q), p: the dense model's final prediction, q: {_LENS}; with the logit lens large in early "
                f"blocks of any model, whose states are not yet in the basis that the head reads; {_OVER_SAMPLED}",
            ),
            "kl_change": Metric(
                "nat", "kl minus that of the dense model's prediction after the same block, paired by position; as kl"
            ),
            "entropy": Metric("nat", f"entropy of the prediction after a block; {_OVER_SAMPLED}"),
            "next_token_loss": Metric(
                "nat", f"negative log-probability of the text's next token in it; {_OVER_SAMPLED}"
            ),
            "agreement": Metric(
                "", f"share of positions whose most likely token is that of the dense model's end; {_OVER_SAMPLED}"
            ),
            "token_share": Metric(
                "",
                "probability that the prediction after a block gives to tokens of other_language: those with two "
                "thirds or more of their frequency (relative to the length of the text, smoothed) in it, counted in "
                "the fitting text; shared: tokens of no single language; unseen: tokens that do not occur there, "
                f"special ones among them; {_OVER_SAMPLED}",
            ),
            "vocabulary_share": Metric(
                "",
                "share of the vocabulary's tokens that are of other_language, which is the token_share of a prediction "
                "that knows nothing (dense model; no language, no layer)",
            ),
            "translated_share": Metric(
                "",
                "share of the variance of the dense model's final states that translated ones explain, mean over "
                "dimensions, on segments of the fitting text that were left out of the fit (tuned lens; no language)",
            ),
            "token_share_change": Metric(
                "", "token_share minus that of the dense model after the same block, paired by position; as above"
            ),
            "token_share_lead": Metric(
                "", "token_share of other_language minus that of the text's own language, same prediction; as above"
            ),
        },
    ),
    "lens_margins": FrameSpec(
        ("language", "task", "category", "layer", "lens"),
        {
            "margin": Metric(
                "nat",
                "log-probability of the right choice minus that of the likeliest other, of the first token at which "
                f"choices differ, in {_LENS}; mean over the two items of a minimal pair, then over pairs (items "
                f"without a twin stand for themselves); {_OVER_TEMPLATES}",
            ),
            "margin_change": Metric("nat", f"margin minus the dense model's after the same block; {_OVER_TEMPLATES}"),
            "ahead": Metric(
                "",
                "share of pairs whose margin is positive after this block and all later ones: in which the right "
                f"choice has overtaken the wrong one for good; {_OVER_SHARE}",
            ),
            "ahead_change": Metric("", f"ahead minus that of the dense model, paired; {_OVER_CHANGE}"),
            "overtaking": Metric(
                "block",
                "block after which the right choice is ahead for good, mean over pairs in which it is in the end (no "
                f"layer); {_OVER_TEMPLATES}",
            ),
            "overtaking_change": Metric(
                "block", f"the same minus the dense model's, over pairs that both get right; {_OVER_TEMPLATES}"
            ),
        },
    ),
    "mask_overlap": FrameSpec(
        ("layer", "role", "other_calibration", "other_seed", "shared_text"),
        {
            "iou": Metric(
                "",
                "intersection over union of the weights kept by two variants that differ only in calibration set or "
                "seed",
            ),
            "iou_chance": Metric(
                "",
                "the same expected of independent masks with the same densities; (1 − s)/(1 + s) at sparsity s",
            ),
            "value_cosine": Metric("", "cosine similarity of the weights that both keep (methods that update weights)"),
            "correction_cosine": Metric(
                "", "cosine similarity of the updates to the weights that both keep; 0: unrelated updates"
            ),
            "code_agreement": Metric("", "share of equal codes (quantized variants, which have no masks)"),
            "code_agreement_chance": Metric("", "the same, expected of independent codes with the same frequencies"),
        },
        estimates=False,
    ),
    "neurons": FrameSpec(
        ("language", "layer", "neuron"),
        {
            "firing_probability": Metric(
                "",
                f"share with a positive gate activation of the {_COUNTED}; for a neuron of an expert, of those routed "
                f"to it, if they are {FEWEST_ROUTED} or more. Neuron n of expert e has the number e · (neurons of an "
                "expert) + n; those of a shared expert come last",
            ),
            "lape": Metric(
                "nat",
                "entropy over languages of the normalised firing probabilities (no language); +inf if it never fires; "
                "left out if a probability is unknown",
            ),
        },
        estimates=False,
        on_demand=True,
    ),
    "neuron_entropy": FrameSpec(
        ("quantile",),
        {"lape": Metric("nat", "LAPE at this quantile of the neurons that fire in this model (no language)")},
        estimates=False,
    ),
    "neuron_shift": FrameSpec(
        ("language", "dense_firing"),
        {
            "specific_shift": Metric(
                "",
                "log2 ratio of the mean firing probability in this model to that in the dense model, over the dense "
                "model's language-specific neurons of one bin of firing probability (dense_firing: its middle)",
            ),
            "other_shift": Metric("", "the same for all other neurons"),
        },
        estimates=False,
    ),
    "language_neurons": FrameSpec(
        ("language", "layer"),
        {
            "kept": Metric(
                "neurons",
                "language-specific (LAPE, selected in each model separately) in the dense model and in this one",
            ),
            "lost": Metric("neurons", "language-specific in the dense model only"),
            "gained": Metric("neurons", "language-specific in this model only"),
            "still_firing": Metric(
                "neurons", "language-specific in the dense model and still firing above its threshold in this one"
            ),
        },
        estimates=False,
    ),
    "neuron_selection": FrameSpec(
        ("language",),
        {
            "selected": Metric("neurons", "language-specific neurons (LAPE) of this model (no language)"),
            "threshold": Metric(
                "", "firing probability above which a neuron counts as active in a language (no language)"
            ),
            "highest_lape": Metric("nat", "highest entropy among the selected neurons (no language)"),
            "selected_by_chance": Metric(
                "neurons",
                "neurons with an entropy no higher than that when text is assigned to languages at random; mean over "
                "permutations of its eighths (no language)",
            ),
            "p_value": Metric(
                "",
                "share of these permutations that select at least as many neurons as the real languages (no language)",
            ),
            "specific": Metric("neurons", "neurons specific to this language in this model"),
            "kept_share": Metric(
                "", "share of the dense model's neurons for this language that are selected again in this model"
            ),
            "kept_by_chance": Metric("", "the same expected of a random selection of the same size"),
            "other_half_share": Metric(
                "",
                "share of the neurons selected for this language on one half of the text that are selected again on "
                "the other half, in the same model: the ceiling that the amount of text sets",
            ),
        },
        estimates=False,
    ),
    "contrasts": FrameSpec(
        ("language", "other_calibration", "shared_text"),
        {
            "log_perplexity": Metric(
                "nat", f"log perplexity with this calibration set minus that with the other; {_PAIRED}"
            ),
            "snr_db": Metric(
                "dB",
                f"the same difference in SNR of the residual stream after the last block; {_PAIRED}",
            ),
            "specific_error_db": Metric(
                "dB",
                f"the same difference in 10·log10 of the language-specific part's error, mean over layers; {_PAIRED}",
            ),
            "agnostic_error_db": Metric("dB", f"the same for the language-agnostic part; {_PAIRED}"),
            "specific_minus_agnostic_db": Metric(
                "dB",
                f"specific_error_db minus agnostic_error_db: which part the choice of text affects more; {_PAIRED}",
            ),
        },
        tests=True,
    ),
    "task_contrasts": FrameSpec(
        ("language", "task", "category", "part", "contrast", "other_category", "other_calibration", "at_chance"),
        {
            "accuracy_drop": Metric(
                "",
                "difference between drops in the share of minimal pairs (items, where there are no pairs) that are "
                f"right; a drop is the dense model's minus the pruned one's; {_DROPS}",
            ),
            "margin_drop": Metric("nat", f"the same for the mean margin of the right choice; {_DROPS}"),
            "accuracy_drop_matched": Metric("", f"accuracy_drop {_MATCHED}; {_DROPS}"),
            "margin_drop_matched": Metric("nat", f"margin_drop {_MATCHED}; {_DROPS}"),
        },
        tests=True,
    ),
    "recipe_contrasts": FrameSpec(
        ("language", "task", "category", "other_recipe", "at_chance"),
        {
            "log_perplexity": Metric("nat", f"log perplexity of this recipe minus that of the other; {_BY_DRAW}"),
            "snr_db": Metric(
                "dB", f"the same difference in SNR of the residual stream after the last block; {_BY_DRAW}"
            ),
            "accuracy": Metric(
                "",
                "the same difference in the share of minimal pairs (items, where there are no pairs) that are right; "
                f"{_BY_DRAW}",
            ),
            "margin": Metric("nat", f"the same difference in the mean margin of the right choice; {_BY_DRAW}"),
        },
        tests=True,
    ),
    "items": FrameSpec(
        ("language", "task", "category", "kind", "template", "grade", "domain", "item", "twin", "choice"),
        {
            "log_likelihood": Metric(
                "nat", "log-likelihood of a choice (numbered from 0) as the continuation of the prompt"
            ),
            "margin": Metric("nat", "log-likelihood of the right choice minus the highest of the others (no choice)"),
            "correct": Metric(
                "", "1 if the model answers correctly, else 0 (no choice); by default: if the margin is positive"
            ),
        },
        estimates=False,
    ),
    "accuracy": FrameSpec(
        ("language", "task", "category", "part", "at_chance"),
        {
            "accuracy": Metric("", f"share of items answered correctly; {_OVER_SHARE}"),
            "accuracy_change": Metric("", f"accuracy minus the dense model's, paired by item; {_OVER_CHANGE}"),
            "twin_accuracy": Metric(
                "",
                "share of minimal pairs (two items with the same choices and opposite answers) whose two margins have "
                f"a positive sum, so that a preference for one of the choices cancels; {_OVER_SHARE}",
            ),
            "twin_accuracy_change": Metric("", f"the same minus the dense model's, paired; {_OVER_CHANGE}"),
            "margin": Metric("nat", f"mean margin of the right choice; {_OVER_TEMPLATES}"),
            "margin_change": Metric("nat", f"the same minus the dense model's, paired by item; {_OVER_TEMPLATES}"),
        },
    ),
    "recovery": FrameSpec(
        (
            "language",
            "task",
            "category",
            "direction",
            "component",
            "layer",
            "role",
            "estimated_on",
            "position",
            "sample",
            "masks",
            "weight_share",
        ),
        {
            "margin_lost": Metric("nat", f"mean margin of the dense model minus that of the pruned one; {_DIAGNOSED}"),
            "accuracy_lost": Metric("", f"accuracy of the dense model minus that of the pruned one; {_DIAGNOSED}"),
            "loss_added": Metric(
                "nat",
                "mean negative log-likelihood of the right choice (for text: of a segment) in the pruned model minus "
                f"that in the dense one; {_DIAGNOSED}",
            ),
            "margin_restored": Metric(
                "nat",
                "mean margin with a component restored minus that of the pruned model (direction damage: that of the "
                f"dense model minus that with it damaged); {_PATCHED}",
            ),
            "accuracy_restored": Metric("", f"the same for accuracy; {_PATCHED}"),
            "loss_restored": Metric("nat", f"the same for the log-likelihood; {_PATCHED}"),
            "margin_recovery": Metric("", f"margin_restored as a share of margin_lost; {_SHARES}"),
            "accuracy_recovery": Metric("", f"accuracy_restored as a share of accuracy_lost; {_SHARES}"),
            "loss_recovery": Metric("", f"loss_restored as a share of loss_added; {_SHARES}"),
            "attributed_restored": Metric(
                "nat",
                "margin_restored (for text: loss_restored) as it is estimated from gradients; of neurons, summed over "
                "blocks, so that what reaches those of later blocks counts twice; controls: as above",
            ),
            "beyond_sum": Metric(
                "nat",
                "margin_restored (for text: loss_restored) of masks undone together minus the sum of what each of them "
                f"restores alone: positive if they need each other; {_DIAGNOSED}",
            ),
            "attributed_recovery": Metric("", "the same as a share of the drop, where that is significant"),
            "error_ratio": Metric(
                "",
                "variance of the pruning error (dense minus pruned mean states of held-out segments) in random "
                "subspaces over that in the language-specific one of the block; low, high: range over the n draws",
            ),
        },
    ),
    "crossing": FrameSpec(
        ("language", "source_language", "task", "category", "layer"),
        {
            "swing": Metric(
                "nat",
                "mean margin of an item's answer minus its margin when the twin is asked instead, in the same language "
                f"and model (no layer); {_OVER_TEMPLATES}",
            ),
            "twin_moved": Metric(
                "nat",
                "mean margin of an item's answer minus its margin when the stream after the block has, at the last "
                "token of the prompt (or of what the choices begin with alike; in an encoder-decoder: of what the "
                "decoder reads), the state of the item's twin asked "
                f"in source_language, in the same model; {_OVER_TEMPLATES}",
            ),
            "control_moved": Metric(
                "nat",
                "the same with the state of an item of another template that has the twin's answer; as twin_moved",
            ),
            "twin_share": Metric(
                "",
                "twin_moved as a share of swing (ratio of sums), only where the interval of swing lies above 0: 0: the "
                "item's own answer, ½: as good as none, 1: its twin's; the same language is the ceiling; "
                f"{_OVER_TEMPLATES}",
            ),
            "control_share": Metric("", "control_moved as a share of swing; as twin_share"),
        },
    ),
    "dose": FrameSpec(
        ("language", "task", "category"),
        {
            "breaking_sparsity": Metric(
                "",
                "sparsity at which accuracy (on minimal pairs, where there are any) has fallen half way from the dense "
                "model's to chance, or perplexity (category text) has doubled; of the variants that differ in nothing "
                "but sparsity, which is therefore empty; interpolated on the nearest curve that never rises; inf: not "
                "at the highest sparsity; no language: over all; left out where the dense model is not shown to be "
                "above chance; 95 % bootstrap interval over templates (text: segments) for one draw",
            )
        },
    ),
    "sparsity": FrameSpec(("layer", "role"), {"sparsity": Metric("", "share of weights removed")}, estimates=False),
}
#: Those that lie beside each diagnosis.
DIAGNOSIS_FRAMES = ("recovery", "crossing")
#: Those that lie in a study's folder.
STUDY_FRAMES = [name for name, spec in FRAMES.items() if not spec.on_demand and name not in DIAGNOSIS_FRAMES]
