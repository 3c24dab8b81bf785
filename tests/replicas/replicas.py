"""Published checkpoints in small: their classes, names of weights and files, with random weights.

Each builder writes a model directory, as the hub gives it, in about a tenth of a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AlbertConfig,
    AlbertForPreTraining,
    BertConfig,
    BertForPreTraining,
    BertModel,
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipImageProcessorPil,
    CLIPTextConfig,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    OPTConfig,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    Owlv2TextConfig,
    Owlv2VisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    RobertaConfig,
    RobertaForMaskedLM,
    Sam3Config,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3Processor,
    Sam3ViTConfig,
    SamConfig,
    SamModel,
    SwinConfig,
)

from gem_ray.grounding.text_segmenter import category_prompt
from gem_ray.nano.llava_model import build_llava
from gem_ray.nano.segmenters import build_clipseg
from gem_ray.rerank.prompts import IMAGE_TOKEN, build_prompt
from gem_ray.rerank.tokenizer import train_byte_level, train_tokenizer
from gem_ray.taxonomy import FMNERG

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = [fine_word for fine in FMNERG.fine for fine_word in category_prompt(fine).split()]
INDEX = "model.safetensors.index.json"


def spread(model: PreTrainedModel, std: float = 0.15) -> PreTrainedModel:
    """Larger weights: an untrained model answers every question alike."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def bert_tokenizer(words: list[str]) -> BertTokenizer:
    """Words of which each is a token, with single letters for all others."""
    letters = [form for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,:'@#_()-" for form in (letter, f"##{letter}")]
    return wordpiece([*words, *letters, "is", "belong"])


def wordpiece(pieces: Iterable[str], length: int = 64) -> BertTokenizer:
    """BERT's tokenizer with no other pieces than these, for texts of so many subwords."""
    names = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces])
    return BertTokenizer({name: index for index, name in enumerate(names)}, model_max_length=length)


def encoder(folder: Path, pieces: Iterable[str], length: int = 64, **config: Any) -> None:
    """A BERT to train taggers from: two small layers, unless `config` says otherwise."""
    tokenizer = wordpiece(pieces, length)
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **size | config)).save_pretrained(folder)


def blip_itm(folder: Path, layers: int = 2) -> None:
    """Salesforce/blip-itm-base-coco and -large-coco, which differ in the width of the image encoder."""
    tokenizer = bert_tokenizer(WORDS)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
    config = BlipConfig(
        text_config={
            **SMALL,
            "num_hidden_layers": layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "encoder_hidden_size": 48,
            "bos_token_id": tokenizer.bos_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**SMALL, "hidden_size": 48, "image_size": 32, "patch_size": 8},
        image_text_hidden_size=16,
    )
    spread(BlipForImageTextRetrieval(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def blip2_itm(folder: Path) -> None:
    """Salesforce/blip2-itm-vit-g."""
    tokenizer = bert_tokenizer(WORDS)
    config = Blip2Config(
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        qformer_config={
            **SMALL,
            "num_hidden_layers": 4,
            "encoder_hidden_size": 32,
            "vocab_size": len(tokenizer),
            "use_qformer_text_input": True,
        },
        num_query_tokens=4,
        image_text_hidden_size=16,
    )
    config.image_token_index = None
    spread(Blip2ForImageTextRetrieval(config)).save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    Blip2Processor(images, tokenizer, num_query_tokens=None).save_pretrained(folder)


def blip2_opt(folder: Path) -> None:
    """Salesforce/blip2-opt-2.7b, whose head and word embeddings are tied."""
    vocabulary = {
        token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *dict.fromkeys(WORDS)])
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    config = Blip2Config(
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        qformer_config={**SMALL, "vocab_size": 50, "encoder_hidden_size": 32},
        text_config=OPTConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=vocabulary["<image>"],
        initializer_range=0.5,  # so large that different images get different captions
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    Blip2Processor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4).save_pretrained(
        folder
    )


def llava(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """llava-hf/llava-1.5-7b-hf."""
    words = ["USER: ASSISTANT: yes no Is it in the image? Answer yes or no.", *WORDS]
    build_llava(
        folder,
        tokenizer or train_tokenizer(words * 2, 400),
        image_size=32,
        patch_size=8,
        vision_layers=1,
        vision_width=32,
        language_layers=2,
        language_width=64,
    )


def llama(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """meta-llama/Meta-Llama-3-8B-Instruct."""
    LlamaForCausalLM(LlamaConfig(**_decoder(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def llava_next(folder: Path) -> None:
    """llava-hf/llava-v1.6-mistral-7b-hf: larger images take more tiles."""
    tokenizer = train_tokenizer(_QUESTIONS, 400)
    tokenizer.chat_template = (
        "{% for message in messages %}[INST] {% for part in message.content %}"
        "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} [/INST]{% endfor %}"
    )
    text = _decoder(tokenizer) | {"model_type": "llama"}
    vision = {**SMALL, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "projection_dim": 32}
    tiles = [[32, 64], [64, 32], [64, 64], [32, 96]]
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_grid_pinpoints=tiles,
    )
    _answering_apart(LlavaNextForConditionalGeneration(config)).save_pretrained(folder)
    rewrite(folder, lambda weights: _rename(weights, "vision_tower.", "vision_tower.vision_model."))
    LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=tiles
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


def qwen2_5_vl(folder: Path) -> None:
    """Qwen/Qwen2.5-VL-7B-Instruct: an image takes as many tokens as it is large."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_byte_level(_QUESTIONS, 500, special),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    config = Qwen2_5_VLConfig(
        text_config=_decoder(tokenizer)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}},
        vision_config={"depth": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 64},
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()},
    )
    _answering_apart(Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=_CHAT_ML,
    ).save_pretrained(folder)


_QUESTIONS = [build_prompt(["so", "this", "is", "Ardenza"], 3, 4, ("music", "musician", "city", "sports_team"))] * 2
_CHAT_ML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _decoder(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The language half of a model that vLLM serves, whose CPU kernels know no attention head smaller than 32."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _answering_apart(model: PreTrainedModel) -> PreTrainedModel:
    """With a fresh head all words are about as likely whatever the image."""
    model.lm_head.weight.data *= 30
    return model


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's, in which each word of a category is one token."""
    return build_clipseg()[1].tokenizer


def clip_text(tokenizer: CLIPTokenizer, length: int) -> dict[str, int]:
    """The text half of a model with CLIP's tokenizer."""
    return {
        **SMALL,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def clipseg(folder: Path) -> None:
    """CIDAS/clipseg-rd64-refined."""
    model, processor = build_clipseg()
    spread(model).save_pretrained(folder)
    processor.save_pretrained(folder)


def sam3(folder: Path) -> None:
    """facebook/sam3, the detector."""
    tokenizer = clip_tokenizer()
    vit = Sam3ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=112,
        pretrain_image_size=56,
        window_size=4,
        global_attn_indexes=[1],
    )
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_layers": 1}
    config = Sam3Config(
        vision_config={
            "backbone_config": vit.to_dict(),
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        text_config=CLIPTextConfig(**clip_text(tokenizer, 32), projection_dim=16).to_dict(),
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config={**small, "num_queries": 6},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    spread(Sam3Model(config)).save_pretrained(folder)
    rewrite(folder, lambda weights: _rename(weights, "", "detector_model."))
    rewrite(folder, lambda weights: weights.update({"tracker_model.no_memory_embedding": torch.zeros(1, 1, 4)}))
    Sam3Processor(Sam3ImageProcessor(size={"height": 112, "width": 112}), tokenizer).save_pretrained(folder)


def grounding_dino(folder: Path) -> None:
    """IDEA-Research/grounding-dino-tiny, whose box heads are tied."""
    vocabulary = {f"[unused{index}]": index for index in range(1030)}
    # The model knows these by their numbers in BERT's vocabulary.
    fixed = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    for token, index in fixed.items():
        del vocabulary[f"[unused{index}]"]
        vocabulary[token] = index
    for word in sorted(set(WORDS)):
        vocabulary[word] = len(vocabulary)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64,
            embed_dim=16,
            depths=[1, 1, 1, 1],
            num_heads=[2, 2, 2, 2],
            window_size=4,
            out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(**SMALL, vocab_size=len(vocabulary)),
        num_queries=12,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    )
    spread(GroundingDinoForObjectDetection(config)).save_pretrained(folder)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 192})
    GroundingDinoProcessor(images, BertTokenizer(vocabulary)).save_pretrained(folder)


def owlv2(folder: Path) -> None:
    """google/owlv2-base-patch16-ensemble."""
    tokenizer = clip_tokenizer()
    config = Owlv2Config(
        text_config=Owlv2TextConfig(**clip_text(tokenizer, 16)).to_dict(),
        vision_config=Owlv2VisionConfig(**SMALL, image_size=64, patch_size=16).to_dict(),
        projection_dim=32,
    )
    spread(Owlv2ForObjectDetection(config)).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)


def sam_vit(folder: Path) -> None:
    """facebook/sam-vit-base, -large and -huge, in the hub's layout."""
    vision = {
        "hidden_size": 24,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 3,
        "global_attn_indexes": [1],
        "mlp_dim": 96,
        "num_pos_feats": 8,
    }
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "image_embedding_size": 8}
    masks = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks))
    with torch.no_grad():
        for parameter in model.parameters():  # relative positions start at zero, which would hide mistakes with them
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


def roberta(folder: Path) -> None:
    """FacebookAI/roberta-large: with the head of its pretraining, without a pooler."""
    RobertaForMaskedLM(RobertaConfig(**SMALL, vocab_size=64)).save_pretrained(folder)


def bert(folder: Path) -> None:
    """google-bert/bert-base-uncased: with the heads of its pretraining, and a pooler."""
    BertForPreTraining(BertConfig(**SMALL, vocab_size=64)).save_pretrained(folder)


def albert(folder: Path) -> None:
    """albert/albert-base-v2: with the heads of its pretraining, and a pooler."""
    AlbertForPreTraining(AlbertConfig(**SMALL, embedding_size=16, vocab_size=64)).save_pretrained(folder)


def gpt2(folder: Path) -> None:
    """A language model whose head is tied."""
    tokenizer = train_tokenizer(WORDS * 2, 400)
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 256, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def chat(folder: Path) -> None:
    """A language model that takes conversations."""
    gpt2(folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")


def _rename(weights: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in list(weights):
        if name.startswith(old):
            weights[new + name.removeprefix(old)] = weights.pop(name)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint of one safetensors file."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def as_bin(folder: Path) -> None:
    """The older layout: one `pytorch_model.bin`, and no safetensors."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    """The layout of large checkpoints: several safetensors files and an index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    places = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    (folder / "model.safetensors").unlink()
