"""Trimming the vocabulary: the same states and logits for ids that are kept, −∞ for the others, and all of it back to the bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import MakeModel
from helpers import perplexity_on, plan_of, run_tiny, state_bytes, timeless, write_documents
from reprune import pipeline
from reprune.errors import ConfigError, RunError
from reprune.eval_setting import EvaluatedRun
from reprune.evaluation.harness import _Counting
from reprune.evaluation.writing import write
from reprune.files import read_json
from reprune.model.head import final_hidden, head_logits, vocabulary_size
from reprune.model.likelihood import row_losses
from reprune.model.loading import LoadedModel
from reprune.model.trimming import require_kept, restore, trim
from reprune.transform.vocabulary import ROWS
from support import ARCHITECTURES, changed, state_of

KEPT = torch.tensor([*range(6), *range(40, 90)])
TOKENS = torch.randint(40, 90, (3, 10), generator=torch.Generator().manual_seed(0))
VOCABULARY = ["transform=vocabulary"]
QUICK = ["reconstruction=br_gp"]

pytestmark = pytest.mark.usefixtures("own_results")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_trimmed_and_restored(make_model: MakeModel, architecture: str, tied: bool) -> None:
    """Catches embeddings that scale what they look up, caps on logits that lift −∞, rows in another order, a head that is
    untied or a bias that is left behind, and anything that restoring does not put back.
    """
    model = make_model(architecture, num_blocks=1, tie_word_embeddings=tied, **({"lm_head_bias": True} if architecture == "phi" else {}))  # fmt: skip
    before, logits, states = state_of(model.model), model.logits(TOKENS), model.embed(TOKENS)
    buffers = {name for name, _ in model.model.named_buffers()}
    hidden = final_hidden(model, TOKENS)[0]
    trimmed, removed = trim(model, KEPT, TOKENS)
    embedding, head = trimmed.model.get_input_embeddings(), trimmed.model.get_output_embeddings()
    assert embedding.weight.shape[0] == head.weight.shape[0] == len(KEPT)
    assert (embedding.weight is head.weight) == tied
    assert set(removed) == ({"embedding"} if tied else {"embedding", "head"})
    assert torch.equal(trimmed.embed(TOKENS), states)
    gone = torch.tensor([it for it in range(258) if it not in KEPT.tolist()])
    for found, wanted in ((trimmed.logits(TOKENS), logits), (head_logits(trimmed, hidden), logits[0])):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found[..., KEPT], wanted[..., KEPT], rtol=1e-5, atol=1e-5)
        assert bool((found[..., gone] == -math.inf).all())
    assert vocabulary_size(trimmed) == 258
    whole = restore(trimmed, removed)
    assert changed(before, whole.model) == set()
    assert set(whole.model.state_dict()) == set(before)
    assert {name for name, _ in whole.model.named_buffers()} == buffers
    assert torch.equal(whole.logits(TOKENS), logits)
    weights = whole.model.get_input_embeddings().weight, whole.model.get_output_embeddings().weight
    assert (weights[0] is weights[1]) == tied
    assert vocabulary_size(whole) == 258


def test_a_bias_of_the_head(make_model: MakeModel) -> None:
    """Catches a bias that is added to the logits of other ids."""
    model = make_model("phi", num_blocks=1)
    assert model.model.get_output_embeddings().bias is not None
    before, logits = state_of(model.model), model.logits(TOKENS)
    trimmed, removed = trim(model, KEPT, TOKENS)
    torch.testing.assert_close(trimmed.logits(TOKENS)[..., KEPT], logits[..., KEPT], rtol=1e-5, atol=1e-5)
    assert changed(before, restore(trimmed, removed).model) == set()


def test_likelihoods_are_over_kept_ids(make_model: MakeModel) -> None:
    """Catches losses whose softmax still counts removed ids, or is not a number."""
    model = make_model("gemma2", num_blocks=2)
    with torch.no_grad():
        kept_logits = model.logits(TOKENS)[..., KEPT]
    place = {int(it): row for row, it in enumerate(KEPT)}
    wanted = []
    for row in range(len(TOKENS)):
        each = [
            -float(torch.log_softmax(kept_logits[row, at].double(), -1)[place[int(TOKENS[row, at + 1])]])
            for at in range(TOKENS.shape[1] - 1)
        ]
        wanted.append(sum(each) / len(each))
    trimmed, _ = trim(model, KEPT, TOKENS)
    assert row_losses(trimmed, TOKENS).tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_writing_keeps_to_what_is_kept(make_model: MakeModel, dtype: str) -> None:
    """Catches −∞ that becomes no number in half precision or in a draw, and ids that nothing can read again."""
    trimmed, _ = trim(make_model("llama", num_blocks=2, dtype=dtype), KEPT, TOKENS)
    streams = [torch.Generator().manual_seed(number) for number in range(3)]
    for stream_of in (None, streams.__getitem__):
        found = write(trimmed, list(TOKENS), 8, 2, [], "here", stream_of=stream_of, temperature=2.0)
        assert {it for one in found for it in one.tokens} <= set(KEPT.tolist())
        assert all(math.isfinite(one.loss) for one in found)


def test_a_removed_id_is_told(make_model: MakeModel) -> None:
    """Catches a row of another token for an id that has none, as an input, and as the last token that is only scored."""
    trimmed, _ = trim(make_model("llama", num_blocks=1), KEPT, TOKENS)
    bad = TOKENS.clone()
    bad[1, 3], bad[2, 5], bad[2, 6] = 200, 7, 200
    told = "2 token ids of this text, in 3 places.*the first is 200"
    for call in (trimmed.logits, trimmed.embed, lambda rows: row_losses(trimmed, rows)):
        with pytest.raises(RunError, match=told):
            call(bad)
    with pytest.raises(RunError, match=told):
        require_kept(trimmed, bad)
    last = TOKENS.clone()
    last[0, -1] = 100
    with pytest.raises(RunError, match="the first is 100"):
        row_losses(trimmed, last)
    harness = _Counting(trimmed, 1, lambda share: None)
    with pytest.raises(RunError, match="the first is 101"):
        harness._loglikelihood_tokens([(("a", "b"), [40, 41], [101])])


OTHERS = {
    "gemma3n_text": {"vocab_size_per_layer_input": 1024, "hidden_size_per_layer_input": 8, "head_dim": 8, "num_kv_shared_layers": 0, "layer_types": "[full_attention,full_attention,full_attention]"},
}  # fmt: skip


def test_a_second_table_is_refused(tmp_path: Path) -> None:
    """Catches embeddings of every layer, whose ids would be rows of another table."""
    fields = str(OTHERS["gemma3n_text"]).replace("'", "").replace(": ", ":")
    with pytest.raises(ConfigError, match=r"transform: tiny: has a second table[\s\S]*per_layer"):
        plan_of(tmp_path, "model.architecture=gemma3n_text", f"+model.config={fields}", *VOCABULARY)


def test_a_second_table_of_few_rows_is_found_when_it_is_read(make_model: MakeModel) -> None:
    """Catches a table that is as small as one of positions, and is given token ids."""
    model = make_model("llama", num_blocks=1)
    model.model.model.extra = torch.nn.Embedding(300, 4)
    model.model.model.register_forward_pre_hook(
        lambda module, given, keywords: (module.extra(keywords["input_ids"]), None)[1], with_kwargs=True
    )
    with pytest.raises(RunError, match="extra is a second table"):
        trim(model, KEPT, TOKENS)


def _evaluation(tmp_path: Path) -> list[str]:
    write_documents(tmp_path / "mine.jsonl")
    return perplexity_on(mine=tmp_path / "mine.jsonl")


@pytest.mark.parametrize(
    "chosen",
    [
        ["reconstruction=br_gp_cr", "model.architecture=gemma2", "+model.config={head_dim:8}"],
        ["pruner=wanda", "reconstruction=least_squares", "allocation=cfsp", "dtype=bfloat16"],
        ["pruner=none", "reconstruction=none"],
    ],
)
def test_restored_is_the_run_without_it(tmp_path: Path, chosen: list[str]) -> None:
    """Catches any number of pruning, reconstruction, evaluation or export that the transform changes."""
    suite = _evaluation(tmp_path)
    suite = [it if it != "evaluation=perplexity" else "evaluation=[perplexity,fidelity]" for it in suite]
    suite += ["~evaluation.fidelity.texts.web", "~evaluation.fidelity.texts.wiki", "~evaluation.fidelity.texts.code"]  # fmt: skip
    suite += [f"+evaluation.fidelity.texts.mine={tmp_path / 'mine.jsonl'}", "evaluation.fidelity.length=16", "evaluation.fidelity.num_windows=3"]  # fmt: skip
    bare, wanted = run_tiny(tmp_path / "bare", *chosen, *suite, "export.model=true")
    plan, found = run_tiny(tmp_path / "own", *chosen, *suite, *VOCABULARY, "export.model=true")
    assert plan.folder.id != bare.folder.id
    assert state_bytes(plan.folder.path) == state_bytes(bare.folder.path)
    assert timeless(plan.folder.blocks()) == timeless(bare.folder.blocks())
    assert found["metrics"] == wanted["metrics"]
    saved = [it.folder.path / "model" for it in (plan, bare)]
    for name in ("model.safetensors", "config.json"):
        assert (saved[0] / name).read_bytes() == (saved[1] / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(saved[0], local_files_only=True)
    facts = found["transform"]
    ids = {it for text in plan.texts(None).all for it in text.tokens_NT.flatten().tolist()} | set(range(6))
    assert facts["kept_rows"] == len(ids) == 258 - facts["removed_rows"] < 258
    width = plan.shapes.hidden_size * (2 if "dtype=bfloat16" in chosen else 4)
    assert facts["bytes_saved"] == facts["removed_rows"] * width * (1 if facts["tied"] else 2)
    rows = load_file(plan.folder.path / ROWS)
    assert set(rows["kept"].tolist()) == ids
    assert len(rows["embedding"]) == facts["removed_rows"]


def test_trimmed_evaluation(tmp_path: Path) -> None:
    """Catches a perplexity of the full model under the trimmed one's name, an export of a trimmed model, and an identity
    that forgets the texts which decide what is kept.
    """
    suite = _evaluation(tmp_path)
    trimmed = [*VOCABULARY, "transform.evaluate=trimmed", *QUICK]
    _, full = run_tiny(tmp_path / "full", *QUICK, *suite)
    plan, found = run_tiny(tmp_path / "own", *trimmed, *suite, "export.model=true")
    name = "eval/pruned/perplexity/mine"
    assert found["metrics"][name] < full["metrics"][name]
    dense = "eval/dense/perplexity/mine"
    assert found["metrics"][dense] == full["metrics"][dense]
    assert "over their ids alone" in found["transform"]["note"]
    saved = load_file(plan.folder.path / "model" / "model.safetensors")
    assert saved["model.embed_tokens.weight"].shape[0] == 258
    assert plan_of(tmp_path, *trimmed).folder.id != plan.folder.id
    # Without its state the exported model is trimmed again.
    for place in ("state", "evaluations"):
        for file in (plan.folder.path / place).iterdir():
            if file.is_file():
                file.unlink()
    EvaluatedRun.of(plan.folder.path, suite).evaluate()
    assert read_json(plan.folder.path / "result.json")["metrics"] == found["metrics"]
    other = tmp_path / "other.jsonl"
    write_documents(other, seed=1)
    with pytest.raises(ConfigError, match=r"another run today: transform differ"):
        EvaluatedRun.of(plan.folder.path, perplexity_on(mine=other))


def test_restored_runs_are_evaluated_later(tmp_path: Path) -> None:
    """Catches a finished run that cannot be evaluated with texts it did not know."""
    plan, _ = run_tiny(tmp_path / "own", *VOCABULARY, *QUICK)
    suite = _evaluation(tmp_path)
    _, wanted = run_tiny(tmp_path / "bare", *QUICK, *suite)
    EvaluatedRun.of(plan.folder.path, suite).evaluate()
    assert read_json(plan.folder.path / "result.json")["metrics"] == wanted["metrics"]


class Killed(BaseException):
    """Nobody catches it."""


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Catches rows that are lost with the process that removed them."""
    undisturbed, wanted = run_tiny(tmp_path / "a", *VOCABULARY, *QUICK, "export.model=true")

    def die(windows: int) -> None:
        raise Killed

    plan = plan_of(tmp_path / "b", *VOCABULARY, *QUICK, "export.model=true")
    with pytest.raises(Killed):
        pipeline.run(plan, die)
    result = pipeline.run(plan_of(tmp_path / "b", *VOCABULARY, *QUICK, "export.model=true"))
    assert state_bytes(plan.folder.path) == state_bytes(undisturbed.folder.path)
    assert result["transform"] == wanted["transform"]
    saved = [it.folder.path / "model" / "model.safetensors" for it in (plan, undisturbed)]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_losses_of_the_language_model_are_finite(tmp_path: Path) -> None:
    """Catches gradients that −∞ turns into no numbers."""
    for method in (["pruner=fisher", "reconstruction=none"], ["pruner=magnitude", "reconstruction=full"]):
        _, result = run_tiny(tmp_path, *VOCABULARY, *method)
        assert all(math.isfinite(it) for it in result["metrics"].values())


def test_texts_that_are_named_are_kept(tmp_path: Path) -> None:
    """Catches a file that is not read, or that is no part of what the run is."""
    (tmp_path / "own.txt").write_text("\x01\x02 Ω", encoding="utf-8")
    named = [f"transform.paths=[{tmp_path / 'own.txt'}]", "transform.evaluate=trimmed"]
    plan, result = run_tiny(tmp_path, *VOCABULARY, "calibration.num_sequences=1", *QUICK, *named)
    other, fewer = run_tiny(tmp_path, *VOCABULARY, "calibration.num_sequences=1", *QUICK, named[1])
    assert plan.folder.id != other.folder.id
    ids = set(plan.tokenizer("\x01\x02 Ω")["input_ids"])
    kept, before = (set(load_file(it.folder.path / ROWS)["kept"].tolist()) for it in (plan, other))
    assert kept == before | ids
    assert ids - before
    assert result["transform"]["kept_rows"] > fewer["transform"]["kept_rows"]
    with pytest.raises(ConfigError, match=r"transform\.paths[\s\S]*no such text"):
        plan_of(tmp_path, *VOCABULARY, "transform.paths=[nowhere.txt]")


def test_comparisons_of_distributions_are_refused(tmp_path: Path) -> None:
    """Catches a divergence that is infinite, or counts removed ids as impossible."""
    suite = [it.replace("perplexity", "fidelity") for it in _evaluation(tmp_path)]
    with pytest.raises(ConfigError, match=r"transform\.evaluate[\s\S]*evaluation\.fidelity"):
        plan_of(tmp_path, *VOCABULARY, "transform.evaluate=trimmed", *suite)


def test_special_tokens_stay(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches an end-of-text token that a text does not hold and that writing needs."""
    from reprune.calibration.roles import Texts
    from reprune.calibration.source import TextSet
    from reprune.engine.activations import Stores
    from reprune.model.tiny import TinyModel
    from reprune.transform.contract import Surroundings
    from reprune.transform.vocabulary import Vocabulary

    model: LoadedModel = make_model("llama", num_blocks=1)
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["é"]})
    model.model.generation_config.eos_token_id = [1, 250]
    text = TextSet("a", "calibration", TOKENS, ("a",), {}, "as_tokenised")
    stores = Stores(model.plan.dtype, 32, tmp_path, on_disk=False)
    around = Surroundings(TinyModel(), Texts(mask=[text]), [], stores, tmp_path)
    left = Vocabulary().apply(model, around)
    assert left.trimmed is not None
    special = {0, 1, 250, *(it for it in model.tokenizer.all_special_ids if it < 258)}
    assert set(left.trimmed.kept.tolist()) == {*range(6), *TOKENS.flatten().tolist(), *special}
