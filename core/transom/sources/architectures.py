"""What is known of architectures outside our own families: what they are, and what else can load them.

The tables say for a model that Transom cannot load why, and what helps, before any file is hashed or a child process
is started. A decoder is in `BY_EXTRA` or `BY_TRANSFORMERS` if a tiny random checkpoint, loaded that way, agreed with
transformers; it is in `BY_NEITHER` if the extra did not agree, and torch does not export it, as no mixture of experts.
Names are those of `model_type` in config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from transom.errors import MissingExtra, SourceError, TransomError
from transom.models import families


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


OWN_GGUF = _names("gemma2 gemma3 llama phi3 qwen2 qwen3")
"""The names of our own families in GGUF files. The families are not imported to read them."""

BY_EXTRA = _names(
    """
    apertus arcee flex_olmo gemma gpt-sw3 gpt2 gpt_neox granite granitemoe granitemoeshared ministral ministral3 mixtral
    nemotron olmo olmo2 olmo3 olmoe openai-gpt opt phi qwen2_moe qwen3_moe smollm3 stablelm starcoder2 youtu
    """
)
"""Decoders that mobius-onnx 0.1 builds as transformers computes them."""

BY_TRANSFORMERS = _names(
    """
    biogpt bloom codegen cohere cohere2 ernie4_5 exaone4 falcon gemma glm glm4 gpt2 gpt_bigcode gptj helium
    hunyuan_v1_dense nanochat persimmon seed_oss xglm
    """
)
"""Decoders that torch exports from a transformers model, and that generate then."""

BY_NEITHER = _names(
    """
    afmoe arctic chatglm dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1 ernie4_5_moe exaone_moe glm4_moe
    glm4_moe_lite gpt_neo gpt_oss hunyuan_v1_moe hy_v3 jetmoe llama4_text longcat_flash minimax_m2 mpt phimoe
    solar_open
    """
)
"""Decoders that neither way loads."""

_ENCODER = "is an encoder, which generates no text"
_ENCODER_DECODER = "is an encoder-decoder; Transom generates with decoders only"
_MULTIMODAL = "reads images or sound beside text; Transom generates with decoders of text only"
_CONDITIONED = "generates from more than the text before (an encoder, images or sound), which Transom does not"
_RECURRENT = "has layers that keep a state (recurrent or convolutional) in place of keys and values"
_DIFFUSION = "generates by diffusion, not token by token"
_OTHER_OUTPUT = "has no output of next tokens"

_RUN_AS_ONNX = "Export it to ONNX, load that file, and call run"
_NOT_DECODERS: Mapping[str, frozenset[str]] = {
    _ENCODER: _names(
        """
        albert bert bert-generation big_bird camembert clip_text_model convbert data2vec-text deberta deberta-v2
        distilbert electra ernie ernie_m esm eurobert flaubert fnet funnel gemma-embedding gte ibert jina-bert-v2
        jina-bert-v3 layoutlm layoutlmv2 layoutlmv3 lilt llama-embed longformer luke markuplm mega megatron-bert
        mobilebert modern-bert modernbert mpnet mra neo-bert nezha nomic-bert nomic-bert-moe nomic_bert nystromformer
        qdqbert rembert roberta roberta-prelayernorm roc_bert roformer splinter squeezebert t5encoder xlm xlm-roberta
        xlm-roberta-xl xmod yoso bros canine tapas
        """
    ),
    _ENCODER_DECODER: _names(
        """
        bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian mbart moonshine
        moonshine_streaming mt5 musicgen musicgen_melody mvp nllb-moe nllb_moe pegasus pegasus_x plbart pop2piano
        prophetnet seamless_m4t seamless_m4t_v2 speech-encoder-decoder speech_to_text speecht5 switch_transformers t5
        t5gemma trocr udop umt5 vision-encoder-decoder whisper xlm-prophetnet
        """
    ),
    _MULTIMODAL: _names(
        """
        aria aya_vision blip blip-2 chameleon cogvlm cohere2_vision deepseek2-ocr deepseek_ocr2 deepseek_vl
        deepseek_vl_hybrid deepseek_vl_v2 emu3 ernie4_5_vl_moe evolla florence2 fuyu gemma3n gemma4 gemma4_unified git
        glm4v glm4v_moe glm_ocr got_ocr2 granite_speech hunyuan_vl idefics idefics2 idefics3 instructblip
        instructblipvideo internvl internvl2 internvl_chat janus kosmos-2 kosmos-2.5 lfm2_vl llama4 llava llava_next
        llava_next_video llava_onevision mistral3 mllama molmo molmo2 ovis2 paddleocr paddleocr_vl paligemma phi3_v
        phi4-siglip phi4_multimodal phi4mm pix2struct pixtral qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_vl qwen2vl
        qwen3_asr qwen3_omni_moe qwen3_vl qwen3_vl_moe qwen3vl qwen3vlmoe shieldgemma2 smolvlm video_llava vipllava
        voxtral
        """
    ),
    _RECURRENT: _names(
        """
        arwkv7 bamba falcon-h1 falcon_h1 falcon_mamba granitehybrid granitemoehybrid jamba kimi-linear kimi_linear lfm2
        lfm2_moe lfm2moe mamba mamba2 minimax nemotron_h nemotron_h_moe plamo2 qwen3_5 qwen3_5_moe qwen3_5_moe_text
        qwen3_5_text qwen35 qwen35moe qwen3_next qwen3next recurrent_gemma rwkv rwkv6 rwkv6qwen2 rwkv7 xlstm zamba
        zamba2
        """
    ),
    _DIFFUSION: _names("diffusion_gemma dream llada llada-moe rnd1"),
    _OTHER_OUTPUT: _names(
        """
        beit blt clip clip_vision_model cvt data2vec-audio data2vec-vision deit depth_anything dinov2
        dinov2_with_registers dinov3_vit hiera hubert ijepa imagegpt mobilevit mobilevitv2 pvt pvt_v2 sam2 segformer sew
        sew-d siglip siglip2 siglip2_vision_model siglip_vision_model swin swin2sr swinv2 unispeech unispeech-sat vit
        vit_hybrid vit_mae vit_msn wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm wavtokenizer-dec yolos
        """
    ),
}
"""Models that are no decoders, by what they are; also the names of `general.architecture` in GGUF files."""

_SPELLINGS = {
    "command-r": "cohere",
    "deepseek2": "deepseek_v2",
    "gptneox": "gpt_neox",
    "hunyuan-dense": "hunyuan_v1_dense",
    "hunyuan-moe": "hunyuan_v1_moe",
    "phi2": "phi",
    "starcoder": "gpt_bigcode",
}
"""The `model_type` for the GGUF names that differ from it in more than dashes and underscores."""

_TEXT_ALONE = frozenset({"gemma3n", "gemma4", "llama4", "mistral3"})
"""Names in GGUF files that are decoders of text, while their Hugging Face directories read images too."""

_DECODER_CLASS = re.compile(r"(ForCausalLM|LMHeadModel|ModelWithLMHead)$")
_SEVERAL_INPUTS = re.compile(r"(ForConditionalGeneration|Seq2Seq|Vision2Seq|ForImageTextToText)$")
_HEADLESS = re.compile(r"(For[A-Z]\w+|Model)$")
_OTHER_INPUTS = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower", "visual")


def what_it_is(config: Mapping[str, Any]) -> str:
    """What a model that is no decoder is, as a predicate; empty for a decoder, and where the config does not tell.

    Args:
        config: the content of a config.json, or the same of a model in memory with its class under `architectures`.
    """
    kind, name = _kind(config), _architecture(config)
    if any(config.get(key) for key in _OTHER_INPUTS):
        return _MULTIMODAL
    if config.get("is_encoder_decoder") is True:
        return _ENCODER_DECODER
    for what, kinds in _NOT_DECODERS.items():
        if kind in kinds:
            return what
    decoders = BY_EXTRA | BY_TRANSFORMERS | BY_NEITHER
    if _SEVERAL_INPUTS.search(name):
        return "" if kind in decoders else _CONDITIONED
    decoders |= {n for family in families() for n in family.model_types}
    if _HEADLESS.search(name) and not _DECODER_CLASS.search(name):
        return _OTHER_OUTPUT if not name.endswith("Model") or kind in decoders else ""
    return ""


def refusal_of_directory(config: Mapping[str, Any], folder: Path, *, extra: bool = False) -> TransomError:
    """Why a Hugging Face directory cannot be loaded, and what helps.

    Args:
        config: the content of its config.json, which names an architecture outside our own families.
        extra: whether the extra is installed, and therefore no help.
    """
    kind, where = _kind(config), folder / "config.json"
    name = _architecture(config) or kind
    if what := what_it_is(config):
        return SourceError(f'The architecture "{name}" of {where} {what}', _instead_of(what))
    if kind in BY_EXTRA and not extra:
        return MissingExtra(f'The architecture "{name}" of {where} is built by mobius-onnx, not by Transom', "families")
    if kind in BY_TRANSFORMERS:
        return SourceError(f'Transom does not build the architecture "{name}" of {where}', through_transformers(folder))
    if kind in BY_NEITHER:
        return SourceError(f'Transom does not support the architecture "{name}" of {where}', _another_model())
    known = {n for family in families() for n in family.architectures}
    return SourceError(
        f'Transom does not know the architecture "{name}" of {where}',
        _unknown(name, known, kind),
    )


def refusal_of_gguf(name: str, path: Path) -> SourceError:
    """Why a GGUF file cannot be loaded, and what helps.

    Args:
        name: its `general.architecture`, which is outside our own families.
    """
    kind = _model_type(name)
    for what, kinds in _NOT_DECODERS.items():
        if name in kinds and name not in _TEXT_ALONE:
            return SourceError(f'The architecture "{name}" of {path} {what}', _instead_of(what))
    directory = "Load the Hugging Face directory that the file was made from"
    if kind in BY_EXTRA:
        return SourceError(
            f'Transom does not build the architecture "{name}" of {path}',
            f"{directory}, with the extra that builds it: pip install 'transom[families]'",
        )
    if kind in BY_TRANSFORMERS:
        return SourceError(
            f'Transom does not build the architecture "{name}" of {path}',
            f"{directory} through transformers: {_THROUGH.format('folder')}",
        )
    if kind in BY_NEITHER or name in _named_by_llama_cpp():
        return SourceError(f'Transom does not support the architecture "{name}" of {path}', _another_model())
    known = {n for family in families() for n in family.gguf}
    return SourceError(f'Transom does not know the architecture "{name}" of {path}', _unknown(name, known, kind))


def refusal_of_object(config: Mapping[str, Any], where: str) -> SourceError | None:
    """Why a transformers model in memory, of an architecture outside our own families, cannot be loaded; None: it may.

    Args:
        config: its configuration, with the name of its class under `architectures`.
        where: names the object in the message.
    """
    if what := what_it_is(config):
        runs = what in (_ENCODER, _OTHER_OUTPUT)
        return SourceError(
            f"{where[0].upper()}{where[1:]} {what}",
            "Load transom.TorchSource(model, (example_input, …)), and call run" if runs else _another_model(),
        )
    if _kind(config) in BY_NEITHER:
        return SourceError(f"Transom does not support the architecture of {where}", _another_model())
    return None


def addition_in(metadata: Mapping[str, Any], path: Path) -> SourceError | None:
    """The reason why a GGUF file is no whole model: an image projector, an adapter, a calibration; None: it is one."""
    kind = metadata.get("general.type")
    if metadata.get("general.architecture") == "clip" or kind == "mmproj":
        return SourceError(
            f"{path} is the part of a multimodal model for images or sound (mmproj), not a language model",
            "Load the GGUF file of the language model beside it; Transom reads text only",
        )
    if kind == "adapter":
        return SourceError(
            f"{path} is an adapter (LoRA), not a whole model",
            "Merge it into its base model, for example with llama-export-lora of llama.cpp, and load the result",
        )
    if kind == "imatrix":
        return SourceError(
            f"{path} is an importance matrix for quantizing a model, not a model", "Load the model's own GGUF file"
        )
    return None


_THROUGH = (
    "transom.load(AutoModelForCausalLM.from_pretrained({})), which exports it with torch "
    "(pip install transformers 'transom[torch]')"
)


def through_transformers(folder: Path | str) -> str:
    """The sentence that recommends to load a directory as a transformers model."""
    return f"In Python, load it through transformers: {_THROUGH.format(repr(str(folder)))}"


def instead_of(kind: str, folder: Path) -> str:
    """What helps where the extra does not: transformers, or another model."""
    return _another_model() if kind in BY_NEITHER else through_transformers(folder)


def _instead_of(what: str) -> str:
    if what in (_ENCODER, _OTHER_OUTPUT):
        return _RUN_AS_ONNX
    if what in (_ENCODER_DECODER, _MULTIMODAL, _CONDITIONED):
        return f"{_another_model()}; or export its parts to ONNX, load each of them, and call run"
    return _another_model()


def _another_model() -> str:
    return f"Choose a model of a family that Transom builds: {', '.join(family.name for family in families())}"


def _unknown(name: str, known: Iterable[str], kind: str) -> str:
    meant = next((n for n in sorted({*known, *BY_EXTRA}) if n not in (name, kind) and _misspelt(name, kind, n)), "")
    return (f'Did you mean "{meant}"? ' if meant else "") + _another_model()


def _misspelt(name: str, kind: str, known: str) -> bool:
    """Whether a name is probably a misspelling of a known one. A longer name or another number means another model."""
    known = _letters(known)
    for word in {_letters(name), _letters(kind)}:
        if word == known:
            return True
        same_numbers = re.findall(r"\d", word) == re.findall(r"\d", known)
        longer = word.startswith(known) or known.startswith(word)
        if same_numbers and not longer and SequenceMatcher(None, word, known).ratio() > 0.82:
            return True
    return False


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _DECODER_CLASS.sub("", name).lower())


def _kind(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else ""


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _model_type(name: str) -> str:
    """The `model_type` of an architecture in a GGUF file; the name itself if the tables have none."""
    if name in _SPELLINGS:
        return _SPELLINGS[name]
    plain = re.sub(r"[-_]", "", name)
    known = BY_EXTRA | BY_TRANSFORMERS | BY_NEITHER
    return next((kind for kind in sorted(known) if re.sub(r"[-_]", "", kind) == plain), name)


def _named_by_llama_cpp() -> frozenset[str]:
    """The architectures that the gguf package knows."""
    import gguf

    return frozenset(gguf.MODEL_ARCH_NAMES.values())
