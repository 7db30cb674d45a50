"""Documents packed into one window: each is computed as if it were alone, and nothing else of a run changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import MakeModel
from helpers import plan_of, run_tiny, write_documents
from reprune.calibration.corpora import Domain
from reprune.calibration.cutting import pack_apart
from reprune.calibration.roles import Texts
from reprune.calibration.source import TextSet
from reprune.calibration.tokens import Tokens
from reprune.calibration.windows import cut_windows
from reprune.engine.activations import Stores
from reprune.engine.chains import Chains
from reprune.errors import ConfigError, RunError
from reprune.model import device
from reprune.model.likelihood import row_losses
from reprune.model.tiny import byte_tokenizer
from reprune.pruning.sparsegpt import SparseGPT
from support import ARCHITECTURES, block_loop, block_outputs, preset, random_text, state_of

REFUSED = "mpt"
"""Its masks say what is hidden, where those of all others say what is seen."""


def _packed(text: TextSet, pieces: Sequence[int]) -> TextSet:
    """The same tokens, every row cut into documents of these lengths."""
    positions = torch.cat([torch.arange(length) for length in pieces]).expand(text.tokens_NT.shape)
    return replace(text, positions_NT=positions.contiguous())


def _alone(text: TextSet, pieces: Sequence[int]) -> list[Tensor]:
    """The documents of a packed text, [rows, length] for each place in the window."""
    return list(text.tokens_NT.split(list(pieces), dim=1))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(2, 11), st.booleans(), st.integers(0, 3)
)
def test_windows_are_the_documents_in_a_row(lengths: list[int], length: int, headed: bool, seed: int) -> None:
    """Catches tokens lost or repeated at a seam, a document without its BOS, and positions that run on."""
    head, end = [1] if headed else [], 2
    documents = [(f"d{i}", torch.arange(n) + 10 * i + 10) for i, n in enumerate(lengths)]
    expected: list[tuple[int, int]] = []
    for _, ids in documents:
        left = [*ids.tolist(), end]
        while left:
            room = length - len(expected) % length
            segment = [*head, *left][:room]
            left = left[max(0, room - len(head)) :]
            expected += [(token, place) for place, token in enumerate(segment)]
    windows = list(pack_apart(documents, length, torch.tensor(head, dtype=torch.long), torch.tensor([end])))
    assert len(windows) == len(expected) // length
    found = [
        pair
        for window in windows
        for pair in zip(window.tokens.tolist(), window.positions.tolist(), strict=True)  # type: ignore[union-attr]
    ]
    assert found == expected[: len(windows) * length]
    for window in windows:
        own = {f"d{token // 10 - 1}" for token in window.tokens.tolist() if token >= 10}
        assert own <= set(window.document_ids)
    if headed:
        assert all(token == 1 for token, place in found if place == 0)
    body = [token for token, _ in found if token != 1]
    stream = [token for _, ids in documents for token in [*ids.tolist(), end]]
    assert body == stream[: len(body)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != REFUSED])
def test_each_document_is_computed_alone(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, batch: int
) -> None:
    """Catches attention or positions that go across documents, in any block, also for rows packed differently."""
    model = make_model(architecture)
    text = random_text("packed", num_sequences=4, length=13)
    cuts = [(5, 8), (13,), (6, 1, 6), (2, 11)]
    places = torch.stack([torch.cat([torch.arange(n) for n in cut]) for cut in cuts])
    packed, plain = replace(text, positions_NT=places), random_text("plain", num_sequences=2, length=13)
    monkeypatch.setitem(device.TOKENS_A_PASS, "cpu", batch * 13)
    chains = Chains(model, [packed, plain], Stores(model.plan.dtype, 32, tmp_path, on_disk=False))
    for block in range(len(model.blocks)):
        chains.advance_dense(block)
    for row, cut in enumerate(cuts):
        start = 0
        for length in cut:
            alone = block_outputs(model, text.tokens_NT[row : row + 1, start : start + length])
            for block, output in enumerate(alone):
                states = chains.dense[block + 1][packed.key].states_NTH[row, start : start + length]
                assert torch.allclose(states, output[0], rtol=1e-4, atol=1e-4 * float(output.abs().max()))
            start += length
    for block, output in enumerate(block_outputs(model, plain.tokens_NT, batch)):
        assert torch.equal(chains.dense[block + 1][plain.key].states_NTH, output), (
            "an unpacked text beside it"
        )


TECHNIQUES: dict[str, dict[str, Any]] = {
    "none": {},
    "least_squares": {},
    "least_squares dense": {"target_chain": "dense"},
    "br": {},
    "br_gp_cr": {},
    "submodule": {},
    "full": {},
}


@pytest.mark.parametrize("kind", list(TECHNIQUES))
def test_packing_changes_nothing_but_the_window(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    """Catches statistics, targets, losses or measured errors that know of windows: documents of one length, packed or a
    window each, all of them in every step, are the same data.
    """
    name = kind.split()[0]
    train = {} if name in ("none", "least_squares") else {"epochs": 3, "learning_rate": 1e-3}
    pieces = (6, 6)
    found = []
    for form in ("packed", "apart"):
        model = make_model("llama")
        # A loss weighted by the batch: all samples in one step, whatever a sample is.
        technique = preset(name, **TECHNIQUES[kind], **train, **({"batch_size": 64} if train else {}))
        text, probe = random_text("mask", num_sequences=8, length=12), random_text("probe", "probe", 3, 12)
        texts = []
        for one in (text, probe):
            split = torch.cat([torch.stack(rows) for rows in zip(*_alone(one, pieces), strict=True)])
            texts.append(_packed(one, pieces) if form == "packed" else replace(one, tokens_NT=split))
        loop = block_loop(
            model,
            tmp_path / form,
            texts=Texts(mask=[texts[0]], reconstruction=[texts[0]], probes=[texts[1]]),
            pruner=SparseGPT(),
            technique=technique,
        )
        rows, masks = loop.run()
        found.append((rows, masks, state_of(model.model)))
    (packed_rows, packed_masks, packed), (rows, masks, apart) = found
    for block, layers in masks.items():
        for layer, keep in layers.items():
            assert torch.equal(packed_masks[block][layer], keep)
    for tensor, value in apart.items():
        assert torch.allclose(packed[tensor], value, rtol=2e-3, atol=2e-4), tensor
    for one, other in zip(packed_rows, rows, strict=True):
        for role in ("calibration", "probe"):
            for text_name, errors in other["after"][role].items():
                assert one["after"][role][text_name] == pytest.approx(errors, rel=1e-3)


def test_losses_count_what_is_predicted(make_model: MakeModel) -> None:
    """Catches the first token of a document predicted from the document before it."""
    model = make_model("llama")
    pieces = (4, 1, 7)
    text = _packed(random_text("mask", num_sequences=5, length=12), pieces)
    sums = torch.zeros(5, dtype=torch.float64)
    for document in _alone(text, pieces):
        logits = model.logits(document)[:, :-1].double()
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), document[:, 1:].flatten(), reduction="none"
        )
        sums += losses.view(5, -1).sum(dim=1)
    expected = sums / (12 - len(pieces))
    assert torch.allclose(row_losses(model, text.tokens_NT, text.positions_NT), expected, rtol=1e-5)
    assert not torch.allclose(row_losses(model, text.tokens_NT), expected, rtol=1e-3)


class _CarriesOn(nn.Module):
    """Adds to each token's state what the token before it entered with, whatever document that belongs to."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
        result: Tensor = self.mlp(hidden + before)
        return result


@pytest.mark.parametrize("kind", ["carries on", REFUSED])
def test_model_that_cannot_keep_documents_apart_is_refused(
    make_model: MakeModel, tmp_path: Path, kind: str
) -> None:
    """Catches a state that goes across documents in spite of the mask, and masks of another meaning."""
    model = make_model("llama" if kind == "carries on" else kind)
    if kind == "carries on":
        model.blocks[1].mlp = _CarriesOn(model.blocks[1].mlp)  # type: ignore[arg-type]
    packed = _packed(random_text("mask", length=12), (6, 6))
    with pytest.raises(RunError, match=r"does not keep documents apart.*cross_documents=true"):
        Chains(model, [packed], Stores(model.plan.dtype, 32, tmp_path, on_disk=False))
    Chains(model, [random_text("mask")], Stores(model.plan.dtype, 32, tmp_path, on_disk=False))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that calibrate on packed windows of a text of 40 random documents."""
    path = tmp_path_factory.mktemp("text") / "mine.jsonl"
    write_documents(path, words=30)
    sizes = ["calibration.num_sequences=4", "calibration.length=300"]
    return ["calibration=domain", f"calibration.domain={path}", "calibration.cut=pack", *sizes]


def test_asking_for_it_lets_attention_across(tmp_path: Path, documents: list[str]) -> None:
    """Catches an option that changes nothing, and packed windows that no longer are one text when asked to be."""
    apart = plan_of(tmp_path, *documents)
    across = plan_of(tmp_path, *documents, "calibration.cross_documents=true")
    [one], [other] = apart.texts(None).mask, across.texts(None).mask
    assert other.positions_NT is None
    assert one.positions_NT is not None
    assert (one.positions_NT == 0).sum(dim=1).min() >= 2
    assert apart.folder.id != across.folder.id
    plain = run_tiny(tmp_path, *documents, "calibration.cross_documents=true", "reconstruction=none")[1]
    kept = run_tiny(tmp_path, *documents, "reconstruction=none")[1]
    name = f"reconstruction/calibration/{one.name}/last"
    assert plain["metrics"][name] != kept["metrics"][name]


def test_a_run_is_driven_by_the_saved_tokens_of_another(tmp_path: Path, documents: list[str]) -> None:
    """Catches token ids that are released without the places where their documents begin."""
    plan, result = run_tiny(tmp_path, *documents, "reconstruction=br", "probes.held_out=null")
    saved = plan.folder.path / "calibration.safetensors"
    [name] = [text.name for text in plan.texts(None).mask]
    both = {"input_ids.position_ids", f"calibration/{name}.position_ids"}
    assert both <= set(load_file(saved))
    given = ["calibration=tokens", f"calibration.path={saved}", "reconstruction=br", "probes.held_out=null"]
    later = plan_of(tmp_path, *given, "calibration.num_sequences=null", "calibration.length=null")
    assert later.texts(None).mask[0].key == plan.texts(None).mask[0].key
    _, again = run_tiny(tmp_path, *given, "calibration.num_sequences=null", "calibration.length=null")
    error = result["metrics"][f"reconstruction/calibration/{plan.texts(None).mask[0].name}/last"]
    assert again["metrics"]["reconstruction/calibration/tokens/last"] == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([[0, 1, 2], [1, 2, 3]]),
        torch.tensor([[0, 1, 3], [0, 1, 2]]),
        torch.tensor([[0, 1, 1], [0, 1, 2]]),
        torch.tensor([[0, 1], [0, 1]]),
        torch.zeros(2, 3),
    ],
)
def test_positions_that_make_no_sense_are_refused(tmp_path: Path, wrong: Tensor) -> None:
    """Catches positions of another tensor, in which attention would be cut anywhere."""
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.full((2, 3), 7), "input_ids.position_ids": wrong}, path)
    with pytest.raises(ConfigError, match=r"(?s)its positions do not count.*input_ids\.position_ids"):
        Tokens(path=str(path)).check("calibration")


def test_selection_by_perplexity_ranks_packed_windows(make_model: MakeModel, tmp_path: Path) -> None:
    """Catches windows ranked by losses that see the documents before."""
    path = tmp_path / "mine.jsonl"
    write_documents(path, words=8)
    model = make_model("llama")
    source = Domain(domain=str(path), num_sequences=None, length=80, cut="pack")
    tokenizer = byte_tokenizer(add_bos=True)
    common: dict[str, Any] = {"role": "calibration", "tokenizer": tokenizer, "seed": 0, "key": "calibration"}
    pool = cut_windows(source, model=None, **common)
    chosen = cut_windows(
        replace(source, num_sequences=4, selection="perplexity", band=(0.0, 0.5)), model=model, **common
    )
    losses = row_losses(model, pool.tokens_NT, pool.positions_NT)
    low = set(losses.argsort()[: int(len(losses) / 2 + 0.5)].tolist())
    expected = [place for place in range(len(losses)) if place in low][:4]
    assert torch.equal(chosen.tokens_NT, pool.tokens_NT[expected])
    assert pool.positions_NT is not None
    assert chosen.positions_NT is not None
    assert torch.equal(chosen.positions_NT, pool.positions_NT[expected])
