"""
What the folder of InternVL3.5-1B's published checkpoint holds, but for its weights: configuration,
tokenizer, image processor.

Facts and their sources, all of them public:
[convert]  the script by InternVL's authors that made the -HF checkpoints (its first half is
           internvl_chat/tools/internvl_custom2hf.py in OpenGVLab/InternVL): config.json, the
           tokens it names, the chat template
[card]     the model card of InternVL3_5-8B: sizes, tiles, frames, the prompt of a video
[audit]    models/internvl35_1b_hf.json in JashinJam/Proactive: parameters stored in the weights of
           InternVL3_5-1B-HF, revision 9191dbcc
[tied]     VAGEN's examples for InternVL3_5-2B-HF (vLLM): the outer config says nothing of tied
           embeddings, that of the text model says false, and the weights are two
[xtuner]   xtuner/v1/model/compose/internvl/internvl_config.py: vision tower, image token, tiles
[hf]       transformers' convert_internvl_weights_to_hf.py (InternVL3): image processor
[8b]       a published test of InternVL3_5-8B-HF (revision 741a7d03): what generation_config.json
           comes to, classes of tokenizer and image processor
Qwen3-0.6B's config and the ids of its tokenizer are those that Qwen published.
UNVERIFIED, because only told by these and not read in the files themselves: the ids of <img>,
</img> and of all that come after <IMG_CONTEXT> (by their order in [convert] behind Qwen3's last,
151668), which tokens are marked special, crop_to_patches in preprocessor_config.json, and that
1B's generation_config.json is as that of 8B.
"""

import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

# Qwen3's tokens from 151643 on, then InternVL's.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
           "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
           "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
NOT_SPECIAL = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
               "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>",
               "</tool_response>", "<think>", "</think>"]
OF_INTERNVL = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>",
               "</box>", "<video>"]
FIRST = 151643
END_OF_TEXT, IM_START, IM_END, CONTEXT = 151643, 151644, 151645, 151671

# [convert]'s template in words of our own: a medium is its token and a newline, no system prompt.
CHAT = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}{{ '\\n' }}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}
{{- {'image': '<IMG_CONTEXT>\\n', 'video': '<video>\\n'}[part.type] if part.type != 'text'
    else part.text -}}
{%- endfor -%}{%- endif -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}"""

TEXT = dict(  # Qwen3-0.6B's, but for the weights that are not tied [tied, audit]
    model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=151936, hidden_size=1024,
    num_hidden_layers=28, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8,
    head_dim=128, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1_000_000,
    rope_scaling=None, hidden_act="silu", attention_bias=False, attention_dropout=0.0,
    use_sliding_window=False, sliding_window=None, max_window_layers=28, initializer_range=0.02,
    tie_word_embeddings=False, bos_token_id=END_OF_TEXT, eos_token_id=IM_END, use_cache=True,
    torch_dtype="bfloat16")
VISION = dict(  # InternViT-300M-448px-V2.5 [convert, xtuner]
    model_type="internvl_vision", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
    intermediate_size=4096, image_size=[448, 448], patch_size=[14, 14], num_channels=3,
    hidden_act="gelu", norm_type="layer_norm", layer_norm_eps=1e-6, attention_bias=True,
    use_qk_norm=False, use_absolute_position_embeddings=True, use_mask_token=False,
    use_mean_pooling=True, layer_scale_init_value=0.1, attention_dropout=0.0,
    hidden_dropout_prob=0.0, projection_dropout=0.0, initializer_range=1e-10,
    torch_dtype="bfloat16")
CONFIG = dict(  # [convert]; nothing of tied embeddings on the outside [tied]
    architectures=["InternVLForConditionalGeneration"], model_type="internvl", text_config=TEXT,
    vision_config=VISION, image_token_id=CONTEXT, image_seq_length=256, downsample_ratio=0.5,
    projector_hidden_act="gelu", vision_feature_layer=-1, torch_dtype="bfloat16",
    vision_feature_select_strategy="default", transformers_version="4.55.0")
IMAGES = dict(  # [hf, 8b]; the processor overrides crop_to_patches
    image_processor_type="GotOcr2ImageProcessorFast", processor_class="InternVLProcessor",
    do_resize=True, size={"height": 448, "width": 448}, resample=3, do_rescale=True,
    rescale_factor=1 / 255, do_normalize=True, image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225], do_convert_rgb=True, crop_to_patches=False, min_patches=1,
    max_patches=12)
GENERATION = dict(  # [8b]
    _from_model_config=True, bos_token_id=END_OF_TEXT, eos_token_id=IM_END,
    transformers_version="4.55.0")


def make_tokenizer(folder, corpus=()):
    """Byte-level BPE with Qwen's pieces. Its merges are learned from the texts of `corpus`, none
    without; the rest of its 151,643 tokens never occur in a text."""
    pieces = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                   r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    vocab, merges = {}, []
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    if corpus:
        vocab, merges = learned(corpus, split)
    for i in range(len(vocab), FIRST):
        vocab[f"filler {i}"] = i
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    added = {}
    for id, token in enumerate(SPECIAL + NOT_SPECIAL + OF_INTERNVL, FIRST):
        special = token not in NOT_SPECIAL
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])
        added[id] = dict(content=token, lstrip=False, normalized=False, rstrip=False,
                         single_word=False, special=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(context_image_token="<IMG_CONTEXT>", start_image_token="<img>",
                 end_image_token="</img>", video_token="<video>")  # [convert]
    write(folder / "tokenizer_config.json", dict(
        tokenizer_class="Qwen2Tokenizer", processor_class="InternVLProcessor",
        eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None, unk_token=None,
        add_bos_token=False, add_prefix_space=False, clean_up_tokenization_spaces=False,
        errors="replace", split_special_tokens=False, model_max_length=40960,
        additional_special_tokens=SPECIAL[1:] + OF_INTERNVL[:-1], extra_special_tokens=named,
        added_tokens_decoder=added, **named))
    (folder / "chat_template.jinja").write_text(CHAT)


def learned(corpus, split):
    """-> vocabulary {token: id} and merges [(token, token)] with which each word of these texts is
    one token, as most are in Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=FIRST, min_frequency=1, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tokenizer.get_vocab(), [tuple(merge) for merge in merges]


def write(path, value):
    path.write_text(json.dumps(value))


def publish(folder, config=CONFIG, corpus=()):
    """All files of the checkpoint but its weights; for `corpus` see make_tokenizer(). -> folder"""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder, corpus)
    write(folder / "config.json", config)
    write(folder / "preprocessor_config.json", IMAGES)
    write(folder / "processor_config.json",
          {"image_seq_length": 256, "processor_class": "InternVLProcessor"})
    write(folder / "generation_config.json", GENERATION)
    return folder
