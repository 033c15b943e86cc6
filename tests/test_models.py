"""AGD(net) and SpectralAGD(net) for networks as torchvision, timm, transformers and PEFT build
them, without pretrained weights, and depth in every kind of layer that torch has."""

import pytest
import torch
import torch.nn as nn
from torchvision import models

import agd
from agd import AGD, SpectralAGD, init_weights
from tests.stock import (
    SPECIAL,
    VOCABULARY,
    assert_all_taken,
    assert_trains,
    characters,
    digits,
    gpt2,
    train,
)

both = pytest.mark.parametrize("rule", [AGD, SpectralAGD])


SMALL = {"img_size": 32, "patch_size": 8}
# Classifiers of one family each, with the arguments that make a smaller or quicker one of its kind,
# or what builds it; `side` of the images is not 32, `steps` not 20.
FAMILIES = {
    "torchvision:alexnet": {"side": 64},
    "torchvision:googlenet": {"init_weights": False},  # its own draw, by SciPy, takes half a minute
    "torchvision:maxvit_t": {"build": lambda: models.MaxVit(
        input_size=(32, 32), stem_channels=32, partition_size=1, block_channels=[32, 64],
        block_layers=[1, 1], head_dim=16, stochastic_depth_prob=0.1, num_classes=10)},
    "torchvision:swin_v2_t": {"build": lambda: models.SwinTransformer(
        [4, 4], 48, [2, 2], [3, 6], [4, 4], stochastic_depth_prob=0.1, num_classes=10,
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2)},
    "torchvision:vgg11_bn": {"steps": 10},
    "torchvision:vit_b_16": {
        "build": lambda: models.VisionTransformer(32, 8, 4, 4, 96, 384, num_classes=10)},
    "timm:beit_base_patch16_224": {**SMALL, "depth": 4, "embed_dim": 96, "num_heads": 4},
    "timm:coatnet_nano_rw_224": {"img_size": 32},
    "timm:deit_tiny_distilled_patch16_224": {**SMALL, "depth": 4},
    "timm:mixer_s16_224": {"build": lambda: pytest.importorskip("timm").models.mlp_mixer.MlpMixer(
        num_classes=10, num_blocks=4, embed_dim=96, **SMALL)},
    "timm:nfnet_l0": {"steps": 16},
    "timm:swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 4, "embed_dim": 48,
                                          "depths": (2, 2), "num_heads": (3, 6)},
    "timm:tnt_s_patch16_224": {"img_size": 32, "depth": 4},
    "timm:vit_tiny_patch16_224": {**SMALL, "depth": 4},
    "timm:xcit_nano_12_p16_224": {"depth": 4},
    **dict.fromkeys([f"torchvision:{name}" for name in """
        convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s mnasnet0_5 mobilenet_v2
        mobilenet_v3_small regnet_y_400mf resnet18 resnet50 shufflenet_v2_x0_5 squeezenet1_0
    """.split()] + [f"timm:{name}" for name in """
        convnext_atto edgenext_xx_small efficientnet_b0 fastvit_t8 ghostnet_100 hrnet_w18_small
        mobilevit_xxs poolformer_s12 pvt_v2_b0 repvgg_a0 resnest14d resnet18 rexnet_100
    """.split()], {}),
}  # fmt: skip
# Families with which the spectral rule is tried as well.
SPECTRAL = ["timm:convnext_atto", "timm:efficientnet_b0", "timm:mixer_s16_224", "timm:resnet18",
            "timm:rexnet_100", "timm:vit_tiny_patch16_224"]  # fmt: skip


def construct(name, side=32, steps=20, build=None, **arguments):
    """The network `name`, drawn from a fixed seed."""
    library, name = name.split(":")
    module = pytest.importorskip(library)
    torch.manual_seed(0)
    if build is not None:
        return build()
    make = module.create_model if library == "timm" else models.get_model
    return make(name, num_classes=10, **arguments)


@pytest.mark.parametrize("name, rule", [
    *[pytest.param(name, AGD, marks=[] if "squeeze" in name or "vit_b" in name
                   else pytest.mark.slow) for name in FAMILIES],
    *[pytest.param(name, SpectralAGD, marks=pytest.mark.slow) for name in SPECTRAL],
])  # fmt: skip
def test_a_classifier_trains_as_it_is(name, rule):
    net, family = construct(name, **FAMILIES[name]), FAMILIES[name]
    assert_trains(net, rule(net), digits(family.get("side", 32)), steps=family.get("steps", 20))


DEPTHS = {
    "alexnet": 8, "convnext_tiny": 20.54, "densenet121": 23.06, "efficientnet_b0": 45.00,
    "googlenet": 17.50, "mobilenet_v3_small": 32.17, "resnet18": 10.17, "resnet50": 19.13,
    "squeezenet1_0": 18.00, "swin_t": 11.64, "vit_b_16": 6.71,
}  # fmt: skip


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("resnet18", "squeezenet1_0") else pytest.mark.slow)
    for name in DEPTHS
])  # fmt: skip
def test_depth_is_the_mean_number_of_weights_on_a_path(name):
    arguments = {"googlenet": {"init_weights": False}, "vit_b_16": {"image_size": 64}}
    # In evaluation: in training googlenet has three outputs, and blocks are dropped at random.
    net = construct(f"torchvision:{name}", **arguments.get(name, {})).eval()
    shares = agd.depth(net, torch.randn(2, 3, 64, 64))
    assert sum(shares.values()) == pytest.approx(DEPTHS[name], abs=0.01)
    assert set(shares) <= {name for name, p in net.named_parameters() if p.ndim > 1}


class States(nn.Module):
    """Of a recurrent network, the states at every time; its last ones are part of them."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0]


@pytest.mark.parametrize("kind, least", [(nn.LSTM, 3.99), (nn.RNN, 3.8), (nn.GRU, 3.8)])
def test_depth_of_a_recurrent_network_counts_both_weights_of_a_layer(kind, least):
    """An unrolled one has a first state that is no function of a weight: a few paths end early."""
    shares = agd.depth(States(kind(8, 8, num_layers=2)), torch.randn(50, 2, 8))
    assert least < sum(shares.values()) < 4.01 and len(shares) == 4


class Standardised(nn.Conv2d):
    """Its weight is normalised in the forward pass, as in nets without batch norm."""

    def forward(self, x):
        rows = self.weight.flatten(1).unsqueeze(0)
        weight = nn.functional.batch_norm(rows, None, None, training=True).view_as(self.weight)
        return nn.functional.conv2d(x, weight, self.bias)


class TwoBiases(nn.Conv2d):
    """Its bias is put together from two, as those of some attention layers."""

    def __init__(self, inputs, outputs, side):
        super().__init__(inputs, outputs, side, bias=False)
        self.first, self.second = (nn.Parameter(torch.zeros(outputs // 2)) for _ in range(2))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, torch.cat([self.first, self.second]))


@pytest.mark.parametrize("kind", [Standardised, TwoBiases])
def test_a_weight_that_is_changed_before_its_use_is_one_weight(kind):
    net = nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 8, 3), nn.ReLU(), kind(8, 4, 3))
    shares = agd.depth(net, torch.randn(2, 3, 8, 8))
    assert shares == {f"{i}.weight": pytest.approx(1) for i in (0, 2, 4)}


@both
def test_what_is_frozen_stays_and_a_tied_weight_stands_once(rule):
    torch.manual_seed(0)
    net = models.shufflenet_v2_x0_5(num_classes=10)
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(("stage4", "conv5", "fc")))
    assert_trains(net, rule(net), digits(), steps=10)
    tied = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12, bias=False))
    tied[1].weight = tied[0].weight
    assert_all_taken(tied, rule(tied))


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4,
         "intermediate_size": 128}  # fmt: skip


def of_transformers(kind, config, **options):
    """f(layers, kind, **arguments): a small network of transformers."""

    def build(layers=2, kind=kind, **arguments):
        transformers = pytest.importorskip("transformers")
        depth = {"num_layers" if "T5" in kind else "num_hidden_layers": layers}
        made = getattr(transformers, config)(**{**SIZES, **options, **depth})
        return getattr(transformers, kind)(made, **arguments)

    return build


bert = of_transformers("BertForMaskedLM", "BertConfig")
llama = of_transformers("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **SPECIAL)
t5 = of_transformers("T5ForConditionalGeneration", "T5Config", d_model=32, d_kv=8, d_ff=128,
                     num_heads=4, decoder_start_token_id=0)  # fmt: skip
vit = of_transformers("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8,
                      num_labels=10)  # fmt: skip


def language(net, codes):
    """The loss that the library computes. Seven in eight of BERT's characters are given."""
    labels = codes
    if type(net).__name__ == "BertForMaskedLM":
        masked = torch.arange(codes.numel()).view(codes.shape) % 8 == 0
        codes, labels = codes.masked_fill(masked, 3), codes.masked_fill(~masked, -100)
    return net(input_ids=codes, labels=labels).loss


@pytest.mark.parametrize("build", [gpt2, bert, llama, t5, vit])
@both
def test_a_network_of_transformers_trains_as_it_is(build, rule):
    torch.manual_seed(0)
    net = build()
    if build is vit:
        assert_trains(net, rule(net), digits())
    else:
        assert_trains(net, rule(net), characters(), language)


class DecoderState(nn.Module):
    """T5 gives its encoder's state as well, which would be a second, shorter way out."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, codes):
        return self.net(input_ids=codes, decoder_input_ids=codes).last_hidden_state


@pytest.mark.parametrize("build, depth", [
    (lambda: gpt2(4), 4.86), (lambda: gpt2(12), 6.71), (lambda: llama(6), 6.36),
    (lambda: bert(6, "BertModel", add_pooling_layer=False), 13.00),
    (lambda: DecoderState(t5(3, "T5Model")), 4.84),
], ids=["gpt2-4", "gpt2-12", "llama-6", "bert-6", "t5-3-3"])  # fmt: skip
def test_depth_of_a_language_model(build, depth):
    net = build()
    shares = agd.depth(net, characters())
    assert sum(shares.values()) == pytest.approx(depth, abs=0.01)
    assert set(shares) == {name for name, p in net.named_parameters() if p.ndim > 1}


def test_depth_counts_both_uses_of_a_tied_weight():
    """As the table of tokens and as the head."""
    tied, free = (agd.depth(gpt2(4, tie_word_embeddings=x), characters()) for x in (True, False))
    table, head = free["transformer.wte.weight"], free["lm_head.weight"]
    assert tied["transformer.wte.weight"] == pytest.approx(table + head)
    assert sum(tied.values()) == pytest.approx(sum(free.values()))


def test_init_weights_draws_a_language_model_that_trains():
    net = gpt2()
    init_weights(net, torch.Generator().manual_seed(0))
    assert_trains(net, AGD(net), characters(), language)


@both
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
