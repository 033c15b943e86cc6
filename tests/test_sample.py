"""scripts.sample: text from the checkpoint of a run."""

import pytest
import torch

from architecture import build
from scripts.sample import main, sampled
from tests.program import only, train

GPT = ["--arch", "gpt", "--depth", "1", "--width", "16", "--heads", "2", "--context", "16",
       "--epochs", "1", "--epoch_steps", "2", "--train_bs", "2", "--test_examples", "2", "--cpu"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Where a run on letters, one on bytes and one on bare ids are, a folder each."""
    out = tmp_path_factory.mktemp("runs")
    (out / "a.txt").write_text("tëxt " * 200, encoding="utf-8")
    (out / "ids").mkdir()
    for part in ("train", "val"):
        (out / "ids" / f"{part}.bin").write_bytes(bytes([1, 0, 2, 0, 3, 0, 4, 0]) * 50)
    for name, data in (("letters", ["shakespeare"]), ("bytes", [f"text:{out}/a.txt"]),
                       ("ids", [f"tokens:{out}/ids", "--vocab", "5"])):  # fmt: skip
        assert train(*GPT, "--dataset", *data, "--out", out / name) == 0
    assert train("--dataset", "digits", "--depth", "2", "--width", "4", "--epochs", "1", "--cpu",
                 "--out", out / "digits") == 0  # fmt: skip
    return out


@pytest.fixture
def written(out, capsys):
    """f(folder of a run, *words) -> (exit code, standard output, standard error)."""

    def write(name, *words):
        capsys.readouterr()
        run = out / name / "logs" / f"{only(out / name)}.jsonl"
        code = main([str(run), "--device", "cpu", *words])
        return code, *capsys.readouterr()

    return write


def test_text_follows_the_prompt(written):
    code, text, message = written("letters", "--prompt", "ROMEO:", "--tokens", "40")
    assert (code, message) == (0, "") and text.startswith("ROMEO:") and len(text) == 6 + 40 + 1
    assert written("letters", "--prompt", "ROMEO:", "--tokens", "40")[1] == text
    assert written("letters", "--prompt", "ROMEO:", "--tokens", "40", "--seed", "1")[1] != text
    assert len(written("letters", "--tokens", "3")[1]) == 4
    likeliest = written("letters", "--temperature", "0", "--tokens", "5")[1]
    assert likeliest == written("letters", "--top_k", "1", "--tokens", "5")[1]


def test_a_character_of_several_bytes_is_one_prompt(written):
    code, text, _ = written("bytes", "--prompt", "të", "--tokens", "5")
    assert code == 0 and text.startswith("të")


def test_tokens_without_an_encoding_are_ids(written):
    code, text, message = written("ids", "--tokens", "7")
    assert code == 0 and "Note: ids" in message
    assert len(text.split()) == 7 and set(text.split()) <= set("01234")
    code, _, message = written("ids", "--prompt", "a")
    assert code == 2 and message.startswith("error: --prompt needs an encoding")


def test_a_document_begins_after_the_end_of_one(written, monkeypatch):
    class Documents:
        end = 4

        def stream(self):
            return lambda ids: f"<{ids[0]}>"

    monkeypatch.setattr("scripts.sample.read_encoding", lambda _: Documents())
    monkeypatch.setattr("scripts.sample.sampled", lambda net, start, *_: iter([*start, 2]))
    assert written("ids")[1] == "<4><2>\n"
    Documents.end = 5
    code, _, message = written("ids")
    assert code == 2 and "has the token 5, and the vocabulary of" in message


def test_the_network_draws_from_its_own_chances():
    torch.manual_seed(0)
    net = build("gpt", (4,), 3, depth=1, width=8, heads=2).eval()
    net.lm_head.weight.data.mul_(30)
    draw = torch.Generator().manual_seed(0)
    start = [0, 1, 2, 0, 1]  # longer than the context, which sees the last four
    with torch.no_grad():
        logits = net(torch.tensor([start[-4:]]))[0, -1]
    for T, k in ((1.0, None), (0.5, None), (1.0, 2)):
        drawn = [next(sampled(net, start, 1, 4, T, k, draw)) for _ in range(1000)]
        kept = logits if k is None else logits.masked_fill(logits < logits.topk(k).values[-1],
                                                           -torch.inf)  # fmt: skip
        wanted = (kept / T).softmax(0)
        found = torch.bincount(torch.tensor(drawn), minlength=3) / len(drawn)
        assert (found - wanted).abs().max() < 0.07, (T, k)
    assert next(sampled(net, start, 1, 4, 0)) == logits.argmax()


@pytest.mark.parametrize(("name", "words", "noun"), [
    ("digits", [], "is a run on images"), ("letters", ["--prompt", "€"], "'€'"),
])  # fmt: skip
def test_what_has_no_text(written, name, words, noun):
    code, text, message = written(name, *words)
    assert code == 2 and message.startswith("error: ") and noun in message and not text


def test_a_run_that_is_not_there(out, capsys):
    assert main(["nothing", "--out", str(out)]) == 2
    assert "no run nothing" in capsys.readouterr().err
