"""The model families that are known here, an entry each: what differs from one to the next.

A family is what transformers calls by one ``model_type``. `moerun` runs those of this table
offloaded, `moetrace` records them, and `Weights` says how the sizes of their weights follow from a
config.json. Whatever can be seen on a model itself (where its experts and gates are, what its cache
holds) stands in no entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WEIGHT_RULES = (
    *("softmax-topk-renorm", "softmax", "topk-softmax", "sigmoid-renorm-scale", "sigmoid"),
    "sqrtsoftplus-renorm-scale",
)
"""The rules by which gates make weights, by name; `weight_rules` computes them."""
GateGives = Literal["logits", "probabilities", "scores"]
"""What a gate's module gives in addition to weights and experts; or, instead of them, the scores of
all experts, 0 where not chosen, and the logits."""


@dataclass(frozen=True, slots=True)
class Weights:
    """How the weights of a family's models follow from a config.json.

    attention  "grouped" heads, "latent" ones (MLA), "indexed": latent with an indexer of sparse
               attention, or "mixed": one layer in several has grouped heads with an output gate,
               the others are gated delta nets
    norms      of queries and keys: "" none, "head" over a head, "all" over all heads
    biases     of queries, keys and values where the config says nothing
    shared     experts that every token passes: "" none, "one" with a gate of its own, "several" as
               one block
    shared_field  of the number of these
    block        of a layer, that its experts are in
    correction   the gate has a bias that serves its choice alone
    correction_at  the module of the block that has it, if not the gate; empty: the block itself
    layer_norms  of each layer
    dense_first  layers without experts at the beginning, where the config says nothing
    tied         the head is the embeddings where the config says nothing
    layout       "" as most; else the architecture of its own in `architectures.py`
    """

    attention: str = "grouped"
    norms: str = ""
    biases: bool = False
    shared: str = ""
    shared_field: str = "n_shared_experts"
    block: str = "mlp"
    router: str = "gate"
    expert_field: str = "moe_intermediate_size"
    top_k_field: str = "num_experts_per_tok"
    correction: bool = False
    correction_at: str | None = None
    layer_norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    dense_first: int = 0
    tied: bool = False
    layout: str = ""


@dataclass(frozen=True, slots=True)
class TextPart:
    """Where a checkpoint of text and images keeps its text model: ``prefix`` of the names of its
    tensors, which ``becomes`` another in the text model alone."""

    prefix: str
    becomes: str


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    model_type   of its config.json
    examples     published checkpoints, by their names on the Hugging Face hub
    weight_rule  by which its gates make weights, with published settings (see `weight_rules`);
                 None: by none that is known, so no policy can give tokens other experts
    notes        what a user should know, in a sentence or two
    also         other names of the same models: of the text part alone
    text         set where the text part is built alone, and stock transformers builds the whole
    others       prefixes of the tensors of other parts (images, sound), which are not read
    gate_gives   what its gates' modules give
    more_gates   classes of gates besides those whose logits transformers records
    gate_norms   names of the norm before the experts, surest first, where unusual
    wide_sums    transformers' eager experts are summed at the precision of the gate's weights
    no_float16   stock transformers cannot compute it in float16
    always_shared  experts that every token passes, where the config does not say
    weights      how its sizes follow from a config.json; None: not known here
    """

    model_type: str
    examples: tuple[str, ...]
    weight_rule: str | None
    notes: str = ""
    also: tuple[str, ...] = ()
    text: TextPart | None = None
    others: tuple[str, ...] = ()
    gate_gives: GateGives = "logits"
    more_gates: tuple[str, ...] = ()
    gate_norms: tuple[str, ...] = ()
    wide_sums: bool = False
    no_float16: bool = False
    always_shared: int = 0
    weights: Weights | None = None


_RENORM, _SIGMOID = "softmax-topk-renorm", "sigmoid-renorm-scale"
_STATE = "Linear attention: its state grows with no token, and cannot be taken back."
_WINDOW = "Some layers look back over a window."
_INDEXED = "Sparse attention: an indexer's keys are cached besides."

FAMILIES: tuple[Family, ...] = (
    Family(
        "afmoe",
        ("arcee-ai/Trinity-Mini",),
        _SIGMOID,
        _WINDOW,
    ),
    Family(
        "cohere2_moe",
        ("CohereLabs/command-a-plus-05-2026",),
        _RENORM,
        _WINDOW,
    ),
    Family(
        "deepseek_v2",
        ("deepseek-ai/DeepSeek-V2-Lite",),
        "softmax",
        weights=Weights("latent", shared="several"),
    ),
    Family(
        "deepseek_v3",
        ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1"),
        _SIGMOID,
        weights=Weights("latent", shared="several", correction=True),
    ),
    Family(
        "deepseek_v32",
        ("deepseek-ai/DeepSeek-V3.2-Exp",),
        _SIGMOID,
        _INDEXED,
        weights=Weights("indexed", shared="several", correction=True),
    ),
    Family(
        "deepseek_v4",
        ("deepseek-ai/DeepSeek-V4-Flash",),
        "sqrtsoftplus-renorm-scale",
        "The gates of the first layers choose experts by a table of tokens: predictions of these "
        "layers are certain. Compressed keys cannot be taken back. Not in float16, in which stock "
        "transformers fails: it keeps the keys' projections in float32.",
        more_gates=("DeepseekV4HashRouter",),
        no_float16=True,
        weights=Weights(shared="several", layout="deepseek_v4"),
    ),
    Family(
        "dots1",
        ("rednote-hilab/dots.llm1.inst",),
        "sigmoid",
        weights=Weights(norms="head", shared="several", correction=True),
    ),
    Family("ernie4_5_moe", ("baidu/ERNIE-4.5-21B-A3B-PT",), _RENORM),
    Family(
        "exaone_moe",
        ("LGAI-EXAONE/K-EXAONE-236B-A23B",),
        _SIGMOID,
        _WINDOW,
        weights=Weights(
            norms="head", shared="several", shared_field="num_shared_experts", correction=True
        ),
    ),
    Family(
        "flex_olmo",
        ("allenai/FlexOlmo-7x7B-1T",),
        "softmax",
        weights=Weights(
            norms="all",
            expert_field="intermediate_size",
            layer_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        ),
    ),
    Family(
        "gemma4",
        ("google/gemma-4-26B-A4B-it",),
        None,
        "Text only. The gate scales each expert's weight by a number of its own, so no policy can "
        "give tokens other experts. " + _WINDOW,
        also=("gemma4_text",),
        text=TextPart("model.language_model.", "model."),
        others=(
            *("model.vision_tower.", "model.embed_vision."),
            *("model.audio_tower.", "model.embed_audio."),
        ),
        gate_gives="probabilities",
        weights=Weights(norms="head", top_k_field="top_k_experts", tied=True, layout="gemma4"),
    ),
    Family(
        "glm4_moe",
        ("zai-org/GLM-4.5-Air",),
        _SIGMOID,
        weights=Weights(shared="several", correction=True),
    ),
    Family(
        "glm4_moe_lite",
        ("zai-org/GLM-4.7-Flash",),
        _SIGMOID,
        weights=Weights("latent", shared="several", correction=True, dense_first=1),
    ),
    Family(
        "glm_moe_dsa",
        ("zai-org/GLM-5",),
        _SIGMOID,
        _INDEXED,
        weights=Weights("indexed", shared="several", correction=True),
    ),
    Family(
        "gpt_oss",
        ("openai/gpt-oss-20b", "openai/gpt-oss-120b"),
        _RENORM,
        _WINDOW,
        weights=Weights(biases=True, router="router", expert_field="intermediate_size"),
    ),
    Family(
        "granitemoe",
        ("ibm-granite/granite-3.1-3b-a800m-instruct",),
        _RENORM,
        weights=Weights(
            block="block_sparse_moe", router="router", expert_field="intermediate_size"
        ),
    ),
    Family("granitemoehybrid", ("ibm-granite/granite-4.0-h-tiny",), _RENORM, _STATE),
    Family("hunyuan_v1_moe", ("tencent/Hunyuan-A13B-Instruct",), _RENORM),
    Family(
        "hy_v3",
        ("tencent/Hy3-preview",),
        _SIGMOID,
        weights=Weights(
            norms="head",
            shared="several",
            shared_field="num_shared_experts",
            correction=True,
            correction_at="",
        ),
    ),
    Family("kimi_linear", ("moonshotai/Kimi-Linear-48B-A3B-Instruct",), _SIGMOID, _STATE),
    Family(
        "llama4",
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct",),
        "sigmoid",
        "Text only, one expert a token, as all published models have it. " + _WINDOW,
        also=("llama4_text",),
        others=("vision_model.", "multi_modal_projector."),
        gate_gives="scores",
        always_shared=1,
    ),
    Family("mimo_v2_flash", ("XiaomiMiMo/MiMo-V2-Flash",), _SIGMOID, _WINDOW),
    Family(
        "minimax_m2",
        ("MiniMaxAI/MiniMax-M2",),
        _SIGMOID,
        weights=Weights(
            norms="all", expert_field="intermediate_size", correction=True, correction_at=""
        ),
    ),
    Family(
        "mixtral",
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
        _RENORM,
        weights=Weights(expert_field="intermediate_size"),
    ),
    Family(
        "nemotron_h",
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",),
        _SIGMOID,
        _STATE,
        gate_norms=("norm",),
        wide_sums=True,
    ),
    Family(
        "olmoe",
        ("allenai/OLMoE-1B-7B-0924",),
        "softmax",
        weights=Weights(norms="all", expert_field="intermediate_size"),
    ),
    Family(
        "phimoe",
        ("microsoft/Phi-3.5-MoE-instruct",),
        None,
        "The gate masks logits for each expert anew, so no policy can give tokens other experts.",
    ),
    Family(
        "qwen2_moe",
        ("Qwen/Qwen1.5-MoE-A2.7B",),
        "softmax",
        weights=Weights(biases=True, shared="one"),
    ),
    Family(
        "qwen3_5_moe",
        ("Qwen/Qwen3.6-35B-A3B", "Qwen/Qwen3.5-35B-A3B"),
        _RENORM,
        "Text only. " + _STATE,
        also=("qwen3_5_moe_text",),
        others=("model.visual.",),
        weights=Weights("mixed", norms="head", shared="one"),
    ),
    Family("qwen3_moe", ("Qwen/Qwen3-30B-A3B",), _RENORM, weights=Weights(norms="head")),
    Family(
        "qwen3_next",
        ("Qwen/Qwen3-Next-80B-A3B-Instruct",),
        _RENORM,
        _STATE,
        weights=Weights("mixed", norms="head", shared="one"),
    ),
    Family(
        "solar_open",
        ("upstage/Solar-Open-100B",),
        _SIGMOID,
        weights=Weights(shared="several", correction=True),
    ),
)

_BY_TYPE = {name: each for each in FAMILIES for name in (each.model_type, *each.also)}


def markdown() -> str:
    """The table of families for a page: what each is called, an example, its gates' rule, notes."""
    rows = ["| model_type | for example | weight rule | notes |", "|---|---|---|---|"]
    for each in FAMILIES:
        rule = f"`{each.weight_rule}`" if each.weight_rule else "none known"
        cells = (f"`{each.model_type}`", ", ".join(each.examples), rule, each.notes)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def family_of(model_type: str | None) -> Family | None:
    """The entry of a config.json's ``model_type``; None where there is none."""
    return _BY_TYPE.get(model_type or "")


if __name__ == "__main__":
    print(markdown(), end="")
