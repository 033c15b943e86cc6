"""The GPT: transformers' GPT-2 as the oracle, its start, AGD's view of it, weights of files."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import agd
from agd import AGD, SpectralAGD, init_weights
from architecture import GPTS, Unfit, build
from architecture.gpt import GPT
from architecture.weights import start
from tests import program, stock
from tests.stock import assert_trains
from training.optimizers import make_optimizer

tying = pytest.mark.parametrize("tied", [True, False])
WIDTH, CONTEXT, VOCABULARY = 32, 16, 61


def small(depth=2, heads=4, context=CONTEXT, vocabulary=VOCABULARY, width=WIDTH, seed=0, **options):
    torch.manual_seed(seed)
    return GPT(vocabulary, context, depth, width, heads, **options)


def rough(net):
    """`net` with weights, biases and gains at random: each of them shows in the outputs."""
    torch.manual_seed(1)
    for p in net.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    return net


def tokens(batch=3, length=CONTEXT, vocabulary=VOCABULARY):
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(2))


def theirs(net, tied=True, **options):
    """transformers' GPT-2 of the sizes of `net`, without weights of it."""
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=net.wte.num_embeddings, n_positions=net.wpe.num_embeddings,
        n_embd=net.wpe.embedding_dim, n_layer=len(net.h), n_head=net.h[0].attn.heads,
        tie_word_embeddings=tied, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0,
        eos_token_id=0, **options))  # fmt: skip


def transposed(name):
    """Whether transformers has a weight as (in, out)."""
    return ".c_" in name and name.endswith("weight")


def in_their_names(net, prefix="transformer.", masks=True):
    """The tensors of a file of transformers' GPT-2 with the weights of `net`."""
    context, state = net.wpe.num_embeddings, {}
    for name, x in net.state_dict().items():
        if name == "lm_head.weight":
            if net.lm_head.weight is not net.wte.weight:
                state[name] = x.clone()
            continue
        state[prefix + name] = x.mT.contiguous() if transposed(name) else x.clone()
    for i in range(len(net.h) if masks else 0):
        state[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, context, context).tril()
        state[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


# The network


@tying
def test_it_is_the_gpt2_of_transformers(tied):
    """In outputs and gradients: the tanh form of GELU, norms, masks, scales and heads."""
    net = rough(small(tied=tied).double())
    twin, x = theirs(net, tied).double(), tokens()
    state = in_their_names(net, masks=False)
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    ours, logits = net(x[:, :-1]), twin(x[:, :-1]).logits
    assert ours.shape == (3, CONTEXT - 1, VOCABULARY)
    torch.testing.assert_close(ours, logits, rtol=1e-10, atol=1e-10)
    for y in (ours, logits):
        F.cross_entropy(y.flatten(0, 1), x[:, 1:].flatten()).backward()
    gradients = {name.removeprefix("transformer."): p.grad for name, p in twin.named_parameters()}
    assert gradients.keys() == dict(net.named_parameters()).keys()
    for name, p in net.named_parameters():
        g = gradients[name].mT if transposed(name) else gradients[name]
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12, msg=name)


def test_a_token_changes_no_earlier_output():
    net, x = rough(small()), tokens()
    with torch.no_grad():
        before = net(x)
        for t in range(CONTEXT):
            y = x.clone()
            y[:, t] = (y[:, t] + 1) % VOCABULARY
            after = net(y)
            assert torch.equal(after[:, :t], before[:, :t])
            assert (after[:, t:] != before[:, t:]).any(-1).all()  # and each later one
        torch.testing.assert_close(net(x[:, :5]), before[:, :5])


def test_the_number_of_weights_is_gpt2s():
    with torch.device("meta"):
        nets = [build("gpt2", (1024,), 50257, *GPTS["gpt2"][:2], heads=12, tied=x)
                for x in (True, False)]  # fmt: skip
    ours = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert ours == [124_439_808, 124_439_808 + 50257 * 768]


def test_names_are_those_of_transformers():
    ours = small(tied=False)
    names = [name for name, _ in theirs(ours, tied=False).named_parameters()]
    assert {x.removeprefix("transformer.") for x in names} == set(ours.state_dict())


def test_the_start_is_gpt2s():
    net, depth = small(depth=3, width=256, vocabulary=512, context=64), 3
    for name, p in net.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.full_like(p, not name.endswith("bias"))), name
            continue
        deviation = 0.02 / math.sqrt(2 * depth) if "c_proj" in name else 0.02
        assert p.std().item() == pytest.approx(deviation, rel=0.02), name
        assert abs(p.mean().item()) < 0.03 * deviation, name


def test_biases_and_affine_norms_can_be_left_out():
    def vectors(**options):
        return {n.rpartition(".")[2] for n, p in small(**options).named_parameters() if p.ndim == 1}

    assert vectors() == {"weight", "bias"} and vectors(bias=False) == {"weight"}
    assert vectors(bias=False, affine=False) == set()
    norms = [m for m in small(affine=False).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 5 and not any(list(m.parameters()) for m in norms)
    net = small(bias=False, affine=False)
    assert net(tokens()).isfinite().all()


def test_dropout_is_of_training_alone():
    """Of the embeddings, the weights of attention and both branches."""
    net, x = rough(small(dropout=0.5)), tokens()
    plain = small()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert not torch.equal(net(x), net(x))
        net.eval()
        assert torch.equal(net(x), plain(x))
        net.train()
        for part in (net.drop, net.h[0].drop, net.h[0].attn, net.h[1].drop, net.h[1].attn):
            for module in net.modules():
                module.training = module is part
            assert not torch.equal(net(x), plain(x)), part


@pytest.mark.parametrize("heads, most", [(5, 4), (48, 32), (7, 4)])
def test_heads_divide_the_width(heads, most):
    words = f"gpt cannot be made: {heads} heads do not divide a width of 32: {most} would do"
    with pytest.raises(Unfit, match=words):
        build("gpt", (16,), 61, 2, 32, heads=heads)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
        small()(tokens(length=17))


def test_autocast_to_bfloat16_is_close():
    net, x = small(width=64), tokens()
    with torch.no_grad():
        exact = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            short = net(x)
    assert short.dtype == torch.bfloat16
    assert (short - exact).norm() < 0.02 * exact.norm()


@pytest.mark.slow
def test_a_compiled_network_is_the_same():
    net, x = rough(small(tied=False)), tokens()
    compiled = torch.compile(net, fullgraph=True)
    for length in (CONTEXT, 5):
        ours, exact = compiled(x[:, :length]), net(x[:, :length])
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


# The optimisers


ROLES = {"wte.weight": "rows", "wpe.weight": "rows", "attn.c_attn.weight": "stacked",
         "attn.c_proj.weight": "matrix", "mlp.c_fc.weight": "matrix", "mlp.c_proj.weight": "matrix",
         "lm_head.weight": "matrix"}  # fmt: skip


def role_of(name):
    own = name.split(".", 2)[-1] if name.startswith("h.") else name
    if own in ROLES:
        return ROLES[own]
    return "gain" if "ln_" in own else "bias"


@tying
@pytest.mark.parametrize("rule", [AGD, SpectralAGD])
def test_roles_and_depth(rule, tied):
    """The bias of a norm has the size of a gain. The head of a tied network is the embedding."""
    net = small(depth=4, tied=tied)
    depth = agd.depth(net, tokens())
    optimizer = rule(net, depth=depth)
    roles = {name: (one.role, one.parts) for name, _, one in optimizer._each()}
    names = [name for name, _ in net.named_parameters()]
    assert roles == {x: (role_of(x), 3 if "c_attn.weight" in x else 1) for x in names}
    assert optimizer.L == pytest.approx(4.858, abs=1e-3)
    head = "wte.weight" if tied else "lm_head.weight"
    assert depth.outputs == {head} and depth["wte.weight"] == pytest.approx(0.5 + tied)
    (line,) = (x for x in optimizer.table().splitlines() if ".c_attn.weight" in x)
    assert line.split()[0] == "h.*.attn.c_attn.weight" and "stacked 3" in line


@pytest.mark.parametrize("layers, L", [("count", 11), ("paths", 3.9)])
def test_the_programs_agd_has_the_same_roles(layers, L):
    """However L is found; the weights are drawn at the sizes of these roles."""
    net = small(tied=False)
    optimizer = make_optimizer("agd", net, (CONTEXT,), layers=layers, seed=0)
    assert optimizer.L == pytest.approx(L)
    for name, _, rule in optimizer._each():
        assert rule.role == role_of(name), name
    s = {name: rule.norm(p.shape) for name, p, rule in optimizer._each()}
    assert s["wte.weight"] == pytest.approx(WIDTH**0.5, rel=1e-4)
    assert s["h.0.attn.c_attn.weight"] == pytest.approx(1, rel=1e-4)


def of_the_text(net, codes):
    return F.cross_entropy(net(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten())


@tying
@pytest.mark.parametrize("rule", [AGD, SpectralAGD])
def test_both_rules_train_it(rule, tied):
    net = small(context=32, vocabulary=stock.VOCABULARY, tied=tied)
    if not tied:
        init_weights(net, torch.Generator().manual_seed(0))
    assert_trains(net, rule(net), stock.characters(), of_the_text)


@pytest.fixture
def mesh():
    """Of a group of this process alone."""
    if not hasattr(torch.cpu.current_stream(), "record_event"):
        pytest.skip("fully_shard of this torch has no CPUs")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["blocks and network", "network", "blocks", "all resharded"])
@pytest.mark.parametrize("rule", [AGD, SpectralAGD])
def test_a_sharded_network_asks_for_its_depth(rule, how, mesh):
    """fully_shard computes with tensors that are not the optimiser's weights: without depth= L is
    their count, with a warning, and no part of it."""
    from torch.distributed.fsdp import fully_shard

    net, x = small(tied=False), tokens()
    given = agd.depth(net, x)
    for part in (*(net.h if how != "network" else ()), *([net] if how != "blocks" else ())):
        fully_shard(part, mesh=mesh, reshard_after_forward=how == "all resharded" or None)
    optimizer = rule(net)
    net(x).square().mean().backward()
    with pytest.warns(UserWarning, match=r"before torch\.compile, fully_shard .*agd\.depth"):
        optimizer.step()
    assert optimizer.L == 2 + 4 * 2 + 1
    optimizer = rule(net, depth=given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x).square().mean().backward()
        optimizer.step()
    assert optimizer.L == sum(given.values()) < 5
    if how in ("network", "blocks"):  # whose weights are still gathered after a pass
        assert agd.depth(net, x) == given
    else:
        with pytest.raises(ValueError, match="no depth can be read"):
            agd.depth(net, x)


# Weights of a file


def saved(state, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return path


def loaded(net, state, tmp_path, name="w.pt"):
    """(outputs, notes) of `net` with the weights of a file."""
    notes = start(net, saved(state, tmp_path / name))
    return net(tokens(length=min(CONTEXT, net.wpe.num_embeddings))), notes


@tying
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_file_in_the_names_of_transformers(prefix, tied, tmp_path):
    """Square weights are transposed as well, masks are left out."""
    source = rough(small(tied=tied))
    state = in_their_names(source, prefix)
    ours, notes = loaded(small(tied=tied, seed=3), state, tmp_path, "w.safetensors")
    assert torch.equal(ours, source(tokens()))
    count = len(source.state_dict())
    assert notes[0].startswith(f"{count} of {count} tensors are those of")
    assert len(notes) == 2 and "the network has 4, a GPT-2 of this width 1" in notes[1]


@tying
def test_a_file_that_transformers_saved(tied, tmp_path):
    net = small(tied=tied)
    twin = theirs(net, tied, initializer_range=0.3)
    twin.save_pretrained(tmp_path, safe_serialization=True)
    start(net, tmp_path / "model.safetensors")
    torch.testing.assert_close(net(tokens()), twin(tokens()).logits, rtol=1e-5, atol=1e-5)


@tying
def test_files_whose_weights_lie_as_ours(tied, tmp_path):
    """A checkpoint of a run; nanoGPT's, of a compiled network; a safetensors file of ours."""
    source = rough(small(tied=tied))
    own = {name: x.clone() for name, x in source.state_dict().items()}
    nano = {f"_orig_mod.{'' if 'lm_head' in name else 'transformer.'}{name}": x
            for name, x in own.items()}  # fmt: skip
    nano["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT).tril()
    nano = {"model": nano, "model_args": {"n_layer": 2, "n_head": 4}, "iter_num": 9}
    run = {"net": own, "epoch": 3, "settings": '{"arch": "gpt"}'}  # which has 4
    for state, name in ((run, "w.pt"), (own, "w.safetensors"), (nano, "ckpt.pt")):
        ours, notes = loaded(small(tied=tied, seed=3), state, tmp_path, name)
        assert torch.equal(ours, source(tokens())), name
        more = ["does not say how many heads it was trained with: the network has 4"]
        assert len(notes) == 1 + len(more) * (name == "w.safetensors"), name
        assert all(x in y for x, y in zip(more, notes[1:]))


@pytest.mark.parametrize("content, heads", [
    ({"settings": '{"arch": "gpt"}'}, 4), ({"settings": '{"arch": "gpt2"}'}, 12),
    ({"settings": '{"arch": "gpt2", "heads": 8}'}, 8), ({"model_args": {"n_head": 2}}, 2),
    *((x, None) for x in ({"settings": "{"}, {"settings": 3}, {"settings": "[" * 10**5},
      {"settings": '{"arch": "fcn"}'}, {"settings": '{"arch": "gpt", "heads": "2"}'},
      {"model_args": 3}, {"model_args": {}}, {"model_args": {"n_head": [2]}})),
])  # fmt: skip
def test_other_heads_are_refused_where_the_file_tells_them(content, heads, tmp_path):
    """They have the same shapes, and would compute something else."""
    state = {"model" if "model_args" in content else "net": small().state_dict(), **content}
    path = saved(state, tmp_path / "w.pt")
    for ours in (1, 2, 4):
        if heads in (None, ours):
            assert start(small(heads=ours), path)
        else:
            with pytest.raises(Unfit, match=f"w.pt has {heads} heads, and the network {ours}: give "
                                            f"--heads {heads}"):  # fmt: skip
                start(small(heads=ours), path)
    if heads:
        with pytest.raises(Unfit, match=f"--width 32, and its --heads, {heads}$"):
            start(small(width=64), path)


def test_a_part_of_a_model_is_refused(tmp_path):
    """By its name, as a shard that has most of it; or where its layout does not show."""
    source = rough(small())
    whole = in_their_names(source)
    part = {name: x for name, x in whole.items() if "c_attn.weight" not in name}
    for state, name in ((part, "w.bin"), (whole, "model-00001-of-00002.safetensors")):
        with pytest.raises(Unfit, match="has a part of a model: save it as one file"):
            start(small(), saved(state, tmp_path / name))
    for name in ("model-00001-of-00001.safetensors", "pytorch_model.bin"):
        ours, _ = loaded(small(seed=3), whole, tmp_path, name)
        assert torch.equal(ours, source(tokens()))


def test_an_untied_network_takes_the_embedding_for_its_head(tmp_path):
    source, net = rough(small()), small(tied=False, seed=3)
    ours, _ = loaded(net, in_their_names(source), tmp_path)
    assert torch.equal(ours, source(tokens()))
    assert net.lm_head.weight is not net.wte.weight


def test_the_context_is_cropped(tmp_path):
    source, net = rough(small()), small(context=6, seed=3)
    ours, notes = loaded(net, in_their_names(source), tmp_path)
    torch.testing.assert_close(ours, source(tokens(length=6)))
    assert "wpe.weight is cropped, to the first 6 of 16 rows" in notes


def test_a_padded_vocabulary(tmp_path):
    """Of a file, or of the network: then the new tokens are improbable from the start, also where
    all logits are far below 0, as GPT-2's."""
    source = rough(small(vocabulary=1200))
    with torch.no_grad():
        source.wte.weight -= 0.05 * source.ln_f.bias
    names = {"wte.weight", "lm_head.weight"}
    ours, notes = loaded(small(vocabulary=1216, seed=3), in_their_names(source), tmp_path)
    exact = source(tokens())
    torch.testing.assert_close(ours[..., :1200], exact)
    assert (ours.softmax(-1)[..., 1200:].amax(-1) <= 1.001 / 1200).all()
    more = {x for x in notes if "16 rows more, each the mean" in x}
    assert {x.split()[0] for x in more} == names
    padded = small(vocabulary=1216, seed=3)
    start(padded, saved(in_their_names(source), tmp_path / "w.pt"))
    ours, notes = loaded(small(vocabulary=1200, seed=4), padded.state_dict(), tmp_path)
    torch.testing.assert_close(ours, exact)
    assert {x.split()[0] for x in notes if "first 1200 of 1216 rows" in x} == names


@pytest.mark.parametrize("vocabulary", [62, 256])
def test_another_vocabulary_is_drawn_anew(vocabulary, tmp_path):
    source, net = rough(small()), small(vocabulary=vocabulary, seed=3)
    before = net.wte.weight.clone()
    _, notes = loaded(net, in_their_names(source), tmp_path)
    assert torch.equal(net.wte.weight, before) and torch.equal(net.wpe.weight, source.wpe.weight)
    assert notes[-1].endswith("drawn anew: wte.weight, lm_head.weight")


@pytest.mark.parametrize("there, here, words", [
    ({}, {"context": 17}, "a context of 16, not of 17: give --context 16 at most"),
    ({"width": 128}, {}, "depth 2 and width 128, and the network 2 and 32: give --depth 2 "
                         "--width 128, and its --heads, 2 where it is GPT-2's"),
    ({"tied": False}, {"tied": True}, "is not its embedding: give --tied off"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(there, here, words, tmp_path):
    path = saved(in_their_names(rough(small(**there))), tmp_path / "w.pt")
    with pytest.raises(Unfit, match=words):
        start(small(**here), path)


@pytest.mark.parametrize("rule", ["agd", "spectral"])
def test_a_run_from_weights_of_a_file(rule, tmp_path, capsys):
    """s is measured on the weights of the file, and the run begins where the file ends."""
    source = small(width=64, context=32, vocabulary=65)
    saved(in_their_names(source), tmp_path / "w.pt")
    flags = ["--arch", "gpt2", "--depth", 2, "--width", 64, "--heads", 4, "--context", 16,
             "--dataset", "shakespeare", "--train_bs", 4, "--epoch_steps", 3, "--epochs", 1,
             "--test_examples", 16, "--optimizer", rule, "--cpu", "--weights",
             tmp_path / "w.pt"]  # fmt: skip
    assert program.train(*flags, "--out", tmp_path) == 0
    text = capsys.readouterr().out
    assert "wpe.weight is cropped, to the first 16 of 32 rows" in text
    first, epoch, _ = program.rows(tmp_path)
    assert first["settings"]["weights"] and 3.5 < epoch["train_loss"] < 4.5
    now = program.weights(tmp_path)
    for name, x in source.state_dict().items():
        if x.ndim > 1 and name != "wpe.weight":
            assert 0 < (now[name] - x).norm() < 3 * x.norm(), name
