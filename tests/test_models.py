"""AGD(net) and SpectralAGD(net) for networks as torchvision, timm, transformers and PEFT build
them, without pretrained weights, and depth in every kind of layer that torch has."""

import pytest
import torch
import torch.nn as nn
from torchvision import models

import agd
from agd import AGD, SpectralAGD, init_weights
from architecture import build
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


def some(cases, fast):
    """The cases, all but the fast ones marked as slow."""
    return [pytest.param(x, marks=[] if x in fast else pytest.mark.slow) for x in cases]


# The smallest side of an image that each takes, and fewer steps of the largest. Other arguments
# make the same network quicker.
FAMILIES = {
    "alexnet": {"side": 64},
    "googlenet": {"init_weights": False},  # its own draw, by SciPy, takes half a minute
    "inception_v3": {"side": 75, "init_weights": False, "aux_logits": False},
    "maxvit_t": {"build": lambda: models.MaxVit(
        input_size=(32, 32), stem_channels=32, partition_size=1, block_channels=[32, 64],
        block_layers=[1, 1], head_dim=16, stochastic_depth_prob=0.1, num_classes=10)},
    "swin_t": {"build": lambda: models.SwinTransformer(
        [4, 4], 48, [2, 2], [3, 6], [4, 4], stochastic_depth_prob=0.1, num_classes=10)},
    "swin_v2_t": {"build": lambda: models.SwinTransformer(
        [4, 4], 48, [2, 2], [3, 6], [4, 4], stochastic_depth_prob=0.1, num_classes=10,
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2)},
    "vgg11": {"steps": 10},
    "vgg11_bn": {"steps": 10},
    "vit_b_16": {"build": lambda: models.VisionTransformer(32, 8, 4, 4, 96, 384, num_classes=10)},
    **dict.fromkeys("""
        convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s mnasnet0_5 mobilenet_v2
        mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d
        shufflenet_v2_x0_5 squeezenet1_0 wide_resnet50_2
    """.split(), {}),
}  # fmt: skip


def construct(name, side=32, steps=20, build=None, **arguments):
    """The network `name` of torchvision, drawn from a fixed seed."""
    torch.manual_seed(0)
    return build() if build else models.get_model(name, num_classes=10, **arguments)


@pytest.mark.parametrize("name", some(FAMILIES, ["squeezenet1_0", "vit_b_16"]))
def test_a_network_of_torchvision_trains_as_it_is(name):
    net, family = construct(name, **FAMILIES[name]), FAMILIES[name]
    assert_trains(net, AGD(net), digits(family.get("side", 32)), steps=family.get("steps", 20))


DEPTHS = {
    "alexnet": 8, "convnext_tiny": 20.54, "densenet121": 23.06, "efficientnet_b0": 45.00,
    "googlenet": 17.50, "mobilenet_v3_small": 32.17, "resnet18": 10.17, "resnet50": 19.13,
    "squeezenet1_0": 18.00, "swin_t": 11.64, "vit_b_16": 6.71,
}  # fmt: skip


@pytest.mark.parametrize("name", some(DEPTHS, ["resnet18", "squeezenet1_0"]))
def test_depth_is_the_mean_number_of_weights_on_a_path(name):
    arguments = {"googlenet": {"init_weights": False}, "vit_b_16": {"image_size": 64}}
    # In evaluation: in training googlenet has three outputs, and blocks are dropped at random.
    net = construct(name, **arguments.get(name, {})).eval()
    shares = agd.depth(net, torch.randn(2, 3, 64, 64))
    assert sum(shares.values()) == pytest.approx(DEPTHS[name], abs=0.01)
    assert set(shares) <= {name for name, p in net.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("arch, depth", [("fcn", 10), ("vgg", 14)])
def test_depth_of_a_chain_counts_its_weights(arch, depth):
    net = build(arch, (1, 8, 8), 10, width=32)
    shares = agd.depth(net, torch.randn(2, 1, 8, 8))
    assert shares == {name: pytest.approx(1) for name, _ in net.named_parameters()}
    assert sum(shares.values()) == pytest.approx(depth)


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


class Centred(nn.Conv2d):
    """As Standardised, by elementary operations."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return nn.functional.conv2d(x, weight, self.bias)


class TwoBiases(nn.Conv2d):
    """Its bias is put together from two, as those of some attention layers."""

    def __init__(self, inputs, outputs, side):
        super().__init__(inputs, outputs, side, bias=False)
        self.first, self.second = (nn.Parameter(torch.zeros(outputs // 2)) for _ in range(2))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, torch.cat([self.first, self.second]))


@pytest.mark.parametrize("kind", [nn.Conv2d, Standardised, Centred, TwoBiases])
def test_a_weight_that_is_changed_before_its_use_is_one_weight(kind):
    net = nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 8, 3), nn.ReLU(), kind(8, 4, 3))
    shares = agd.depth(net, torch.randn(2, 3, 8, 8))
    assert shares == {f"{i}.weight": pytest.approx(1) for i in (0, 2, 4)}


@both
def test_what_is_frozen_stays_and_a_tied_weight_stands_once(rule):
    torch.manual_seed(0)
    net = models.resnet18(num_classes=10)
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(("layer4", "fc")))
    assert_trains(net, rule(net), digits(), steps=10)
    tied = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12, bias=False))
    tied[1].weight = tied[0].weight
    assert_all_taken(tied, rule(tied))


SMALL = {"img_size": 32, "patch_size": 8}
MLP = {**SMALL, "num_blocks": 4, "embed_dim": 96}
# Families of timm: the arguments that make a smaller network of the same kind, or the class that
# takes them; `side` is the image's, `steps` not 20.
TIMM = {
    "beit_base_patch16_224": {**SMALL, "depth": 4, "embed_dim": 96, "num_heads": 4},
    "cait_xxs24_224": {**SMALL, "depth": 4},
    "coatnet_nano_rw_224": {"img_size": 32},
    "convmixer.ConvMixer": {"dim": 64, "depth": 4, "patch_size": 4},
    "deit_tiny_distilled_patch16_224": {**SMALL, "depth": 4},
    "eva02_tiny_patch14_224": {**SMALL, "depth": 4},
    "levit.Levit": {"img_size": 64, "embed_dim": (64, 96), "key_dim": 16, "depth": (2, 2),
                    "num_heads": (2, 3), "side": 64},
    "mlp_mixer.MlpMixer": MLP,
    "nfnet_l0": {"steps": 16},
    "selecsls42": {"steps": 10},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 4, "embed_dim": 48,
                                     "depths": (2, 2), "num_heads": (3, 6)},
    "tnt_s_patch16_224": {"img_size": 32, "depth": 4},
    "visformer_tiny": {"img_size": 64, "side": 64, "steps": 10},
    "vit_tiny_patch16_224": {**SMALL, "depth": 4},
    "xception41": {"steps": 10},
    "xcit_nano_12_p16_224": {"depth": 4},
    **dict.fromkeys("""
        convnext_atto densenet121 edgenext_xx_small efficientnet_b0 fastvit_t8 ghostnet_100
        hrnet_w18_small mobilenetv3_small_050 mobilevit_xxs poolformer_s12 pvt_v2_b0 regnetx_002
        repvgg_a0 resnest14d resnet18 rexnet_100
    """.split(), {}),
}  # fmt: skip


# Families with which the spectral rule is tried as well.
SPECTRAL = ["convnext_atto", "efficientnet_b0", "mlp_mixer.MlpMixer", "resnet18", "rexnet_100",
            "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"]  # fmt: skip


@pytest.mark.slow
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
