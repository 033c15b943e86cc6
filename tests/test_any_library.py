"""AGD(net) for networks as timm, transformers and PEFT build them, without pretrained weights."""

import os

import pytest
import torch
import torch.nn as nn

import agd
from agd import AGD, SpectralAGD, init_weights
from tests.stock import VOCABULARY, assert_all_taken, assert_trains, characters, digits, train

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is downloaded


SMALL = {"img_size": 32, "patch_size": 8}
MLP = {**SMALL, "num_blocks": 4, "embed_dim": 96}
# Families of timm: the arguments that make a smaller network of the same kind, or the class that
# takes them; `side` is the image's, `steps` not 20.
TIMM = {
    "beit_base_patch16_224": {**SMALL, "depth": 4, "embed_dim": 96, "num_heads": 4},
    "cait_xxs24_224": {**SMALL, "depth": 4},
    "coatnet_nano_rw_224": {"img_size": 32},
    "convmixer.ConvMixer": {"dim": 64, "depth": 4, "patch_size": 4},
    "convnext_atto": {},
    "deit_tiny_distilled_patch16_224": {**SMALL, "depth": 4},
    "densenet121": {},
    "edgenext_xx_small": {},
    "efficientnet_b0": {},
    "eva02_tiny_patch14_224": {**SMALL, "depth": 4},
    "fastvit_t8": {},
    "ghostnet_100": {},
    "hrnet_w18_small": {},
    "levit.Levit": {"img_size": 64, "embed_dim": (64, 96), "key_dim": 16, "depth": (2, 2),
                    "num_heads": (2, 3), "side": 64},
    "mlp_mixer.MlpMixer": MLP,
    "mobilenetv3_small_050": {},
    "mobilevit_xxs": {},
    "nfnet_l0": {"steps": 16},
    "poolformer_s12": {},
    "pvt_v2_b0": {},
    "regnetx_002": {},
    "repvgg_a0": {},
    "resnest14d": {},
    "resnet18": {},
    "rexnet_100": {},
    "selecsls42": {"steps": 10},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 4, "embed_dim": 48,
                                     "depths": (2, 2), "num_heads": (3, 6)},
    "tnt_s_patch16_224": {"img_size": 32, "depth": 4},
    "visformer_tiny": {"img_size": 64, "side": 64, "steps": 10},
    "vit_tiny_patch16_224": {**SMALL, "depth": 4},
    "xception41": {"steps": 10},
    "xcit_nano_12_p16_224": {"depth": 4},
}  # fmt: skip


# Families with which the spectral rule is tried as well.
SPECTRAL = ["convnext_atto", "efficientnet_b0", "mlp_mixer.MlpMixer", "resnet18", "rexnet_100",
            "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"]  # fmt: skip


@pytest.mark.parametrize(
    "name, rule", [*((name, AGD) for name in TIMM), *((name, SpectralAGD) for name in SPECTRAL)]
)
def test_a_network_of_timm_trains_as_it_is(name, rule):
    timm = pytest.importorskip("timm")
    arguments = dict(TIMM[name])
    side, steps = arguments.pop("side", 32), arguments.pop("steps", 20)
    torch.manual_seed(0)
    if "." in name:
        module, kind = name.split(".")
        net = getattr(getattr(timm.models, module), kind)(num_classes=10, **arguments)
    else:
        net = timm.create_model(name, num_classes=10, **arguments)
    assert_trains(net, rule(net), digits(side), steps=steps)


SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def gpt2(layers=2, **changes):
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=layers, n_head=4, **SPECIAL,
        **changes))  # fmt: skip


def bert(layers=2, kind="BertForMaskedLM", **arguments):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, kind)(transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=128), **arguments)  # fmt: skip


def llama(layers=2):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, **SPECIAL))  # fmt: skip


def t5(layers=2, kind="T5ForConditionalGeneration"):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, kind)(transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=128, num_layers=layers, num_heads=4,
        decoder_start_token_id=0))  # fmt: skip


def vit():
    transformers = pytest.importorskip("transformers")
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, num_labels=10))  # fmt: skip


def language(net, codes):
    """The loss that the library computes. Seven in eight of BERT's characters are given."""
    labels = codes
    if type(net).__name__ == "BertForMaskedLM":
        masked = torch.arange(codes.numel()).view(codes.shape) % 8 == 0
        codes, labels = codes.masked_fill(masked, 3), codes.masked_fill(~masked, -100)
    return net(input_ids=codes, labels=labels).loss


@pytest.mark.parametrize("build", [gpt2, bert, llama, t5])
@pytest.mark.parametrize("rule", [AGD, SpectralAGD])
def test_a_language_model_of_transformers_trains_as_it_is(build, rule):
    torch.manual_seed(0)
    net = build()
    assert_trains(net, rule(net), characters(), language)


def test_a_vision_transformer_of_transformers_trains_as_it_is():
    torch.manual_seed(0)
    net = vit()
    assert_trains(net, AGD(net), digits())


class DecoderState(nn.Module):
    """T5 gives its encoder's state as well, which would be a second, shorter way out."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, codes):
        return self.net(input_ids=codes, decoder_input_ids=codes).last_hidden_state


@pytest.mark.parametrize(
    "build, depth",
    [
        (lambda: gpt2(4), 4.86),
        (lambda: gpt2(12), 6.71),
        (lambda: llama(6), 6.36),
        (lambda: bert(6, "BertModel", add_pooling_layer=False), 13.00),
        (lambda: DecoderState(t5(3, "T5Model")), 4.84),
    ],
    ids=["gpt2-4", "gpt2-12", "llama-6", "bert-6", "t5-3-3"],
)
def test_depth_of_a_language_model(build, depth):
    net = build()
    shares = agd.depth(net, characters())
    assert sum(shares.values()) == pytest.approx(depth, abs=0.01)
    assert set(shares) == {name for name, p in net.named_parameters() if p.ndim > 1}


def test_a_tied_head_is_one_weight_and_is_measured_once():
    net = gpt2()
    assert net.lm_head.weight is net.transformer.wte.weight
    optimizer = AGD(net)
    assert_all_taken(net, optimizer)
    tied = [p for group in optimizer.param_groups for p in group["params"]
            if p is net.lm_head.weight]  # fmt: skip
    assert len(tied) == 1


def test_depth_counts_both_uses_of_a_tied_weight():
    """As the table of tokens and as the head."""
    tied, free = gpt2(4), gpt2(4, tie_word_embeddings=False)
    tied, free = (agd.depth(net, characters()) for net in (tied, free))
    assert tied["transformer.wte.weight"] == pytest.approx(
        free["transformer.wte.weight"] + free["lm_head.weight"]
    )
    assert sum(tied.values()) == pytest.approx(sum(free.values()))


def test_init_weights_draws_a_language_model_that_trains():
    torch.manual_seed(0)
    net = gpt2()
    init_weights(net, torch.Generator().manual_seed(0))
    assert_trains(net, AGD(net), characters(), language)


@pytest.mark.parametrize("rule", [AGD, SpectralAGD])
def test_adapters_of_peft_train_on_a_frozen_network(rule):
    """To write every character as the next one of the alphabet."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = gpt2()
    train(base, AGD(base), characters(), language)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    net = peft.get_peft_model(base, config)
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 3 * 2 and all("lora_" in name for name in names)
    assert_trains(net, rule(net), characters() + 1, language)
