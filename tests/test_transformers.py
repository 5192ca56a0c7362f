"""symmetry_of on models of the transformers library, small and random; skipped where it is absent.

What theory gives for a layer of width 32 with 4 heads of 8, and 48 units in the MLP: 32 units of
each norm with an affine output, 32 of queries with keys and 32 of values with the output, both
GL(8) for each head. Rotary embeddings leave 4 rescalings of a head's queries with its keys, of
pairs of entries. SwiGLU leaves its 48 units; GELU none; ReLU 48. Queries that share keys and values
share their scales.
"""

import time

import pytest
import torch

from parameter_symmetries import LINEAR, check_symmetry, symmetry_of

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARED = SIZES | {"num_key_value_heads": 2}
IMAGES = SIZES | {"image_size": 32, "patch_size": 8}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BLOOM = {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}
SWIN = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
SWIN_UNITS = 2 * 4 * 8 + 32 + 2 * 4 * 16 + 16  # norms and attention of blocks, the norms between
# of each layer the norm, the units that the depthwise convolution reads, the rank of Δ, and B
# against C
MAMBA = 2 * (32 + 48 + 2 + 4)
LLAMA = 2 * (32 + 2 * 4 + 16 + 32 + 48) + 32

MODELS = {  # class: configuration, units, GL(d)
    "GPT2LMHeadModel": (GPT2, 2 * 4 * 32, {8: 16}),
    "LlamaForCausalLM": (SHARED, LLAMA, {8: 4}),
    "MistralForCausalLM": (SHARED, LLAMA, {8: 4}),
    "Qwen2ForCausalLM": (SHARED, LLAMA, {8: 4}),
    # norms of queries and keys have 4 pairs for all heads
    "Qwen3ForCausalLM": (SHARED | {"head_dim": 8}, LLAMA - 2 * 4, {8: 4}),
    "GemmaForCausalLM": (SHARED | {"head_dim": 8}, 2 * (8 + 16 + 48), {8: 4}),  # norms by 1 + w
    "PhiForCausalLM": (SIZES, 2 * (32 + 4 * (2 + 4) + 32) + 32, {4: 8, 8: 8}),  # rotates a half
    "OPTForCausalLM": (SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}, 352, {8: 16}),
    "BloomForCausalLM": (BLOOM, 2 * 4 * 32, {8: 16}),
    "MambaForCausalLM": (SIZES | {"state_size": 4}, MAMBA, {2: 2}),
    "MixtralForCausalLM": (SHARED | {"num_local_experts": 4}, LLAMA + 2 * 3 * 48, {8: 4}),
    "BertForMaskedLM": (SIZES, 2 * 2 * 32 + 32, {8: 16}),
    "T5ForConditionalGeneration": (T5, 2 * (176 + 272), {8: 48}),
    "ViTForImageClassification": (IMAGES, 2 * 4 * 32 + 32, {8: 16}),
    "SwinForImageClassification": (
        SWIN | {"image_size": 32, "patch_size": 2},
        SWIN_UNITS,
        {4: 8, 8: 8},
    ),
    "ResNetForImageClassification": (STAGES | {"layer_type": "basic"}, 48, {}),
    "MobileNetV2ForImageClassification": ({"depth_multiplier": 0.25, "image_size": 32}, 184, {}),
    "ConvNextForImageClassification": (STAGES | {"num_stages": 2}, 72, {}),
}


def model_of(name, sizes):
    torch.manual_seed(0)
    model_type = getattr(transformers, name)
    known = {key: value for key, value in sizes.items() if hasattr(model_type.config_class(), key)}
    config = model_type.config_class(**known)
    config.use_cache, config._experts_implementation = False, "eager"
    model = model_type(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some begin as 0 or 1
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch_of(name, count, length):
    if "Image" in name:
        return {"pixel_values": torch.rand(count, 3, 32, 32)}
    batch = {"input_ids": torch.randint(3, 90, (count, length))}
    if name.startswith("T5"):
        batch["decoder_input_ids"] = torch.randint(3, 90, (count, length + 2))
    return batch


@pytest.mark.parametrize("name", MODELS)
def test_it_finds_the_symmetries_of_models_that_people_use(name):
    sizes, units, blocks = MODELS[name]
    model = model_of(name, sizes)
    symmetry = symmetry_of(model, **batch_of(name, 2, 16))
    found = {}
    for group in symmetry:
        if group.kind == LINEAR:
            found[group.size] = found.get(group.size, 0) + group.count
    assert found == blocks, symmetry
    assert sum(group.count * group.size for group in symmetry) == units, symmetry
    check_symmetry(model, symmetry, **batch_of(name, 3, 23))


def test_a_gpt_2_of_real_size_takes_seconds():
    config = transformers.GPT2Config(use_cache=False)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    begin = time.process_time()
    symmetry = symmetry_of(model, torch.randint(50_000, (1, 64)))
    assert time.process_time() - begin < 10
    assert sum(group.count * group.size for group in symmetry) == 12 * 4 * 768
