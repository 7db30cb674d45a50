"""Take the rows of token ids that do not occur out of embedding and head, reversibly."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reprune.calibration.corpus import Corpus, file_corpus
from reprune.errors import ConfigError
from reprune.evaluation.suite import SuiteEntry
from reprune.files import write_json
from reprune.model.checkpoint import ModelSource
from reprune.model.loading import LoadedModel
from reprune.model.trimming import PROBED, find_vocabulary, restore, trim
from reprune.tensor_files import write_tensors
from reprune.transform.contract import RECORD, Surroundings, Wanted

LOG = logging.getLogger("reprune")
ROWS = "removed_rows.safetensors"
"""In the run folder: the kept ids, and the rows of the others (of a tied head once)."""
NOTES = {
    "restored": "evaluated with all rows; losses and gradients of the language model that pruning or reconstruction "
    "read are over the kept ids",
    "trimmed": "evaluated with the kept rows: the softmax is over their ids alone, so that perplexities are lower than "
    "those of the dense model beside them, whose softmax is over all ids",
}


@dataclass(kw_only=True)
class Vocabulary:
    """Keeps the rows of token ids that occur in the run's own texts and in those at `paths`, and of special tokens.

    Williams & Aletras, arXiv 2309.08708: embedding rows of ids that do not occur in the data at hand are taken out, and
    put back afterwards. Theirs numbers the ids anew; here ids and tokenizer stay, and the model looks its rows up.

    Tokens of the run are those of mask and reconstruction data, validation texts and probes; `paths` are files or folders
    as of calibration=domain. The first six ids stay as well, with which the code looks at shapes. Logits of removed ids
    are −∞, and a text that holds one is refused with RunError.

    `evaluate: restored` (default) puts the rows back before the evaluation: what the blocks compute depends on no row of
    another id, so that pruning, reconstruction and evaluation are those of the run without the transform, to the bit.
    Methods that read the language model's loss (gradients of the whole model, reconstruction=full) are the exception:
    its softmax is over the kept ids. With `trimmed` the evaluation is of the trimmed model: the texts of the evaluators
    are kept, too, and belong to what the run is, and whatever depends on a softmax (perplexity above all) differs from
    the full model's: it is over kept ids. Evaluators that compare distributions with the dense model's are refused.

    Exports are of the restored model. Memory that is saved lies outside the blocks; logits are as wide as before.

    RECORD holds `kept_rows`, `removed_rows`, `bytes_saved`, `tied`, `evaluated` and a `note`.
    """

    paths: list[str] = field(default_factory=list)
    text_field: str = "text"
    evaluate: Literal["restored", "trimmed"] = "restored"

    renumbers: ClassVar[bool] = False
    keeps_rows: ClassVar[bool] = True

    def identity(self) -> dict[str, Any]:
        """The choice, files by their content."""
        return {
            "texts": sorted(corpus.sha256 for corpus in self._corpora()),
            "evaluate": self.evaluate,
        }

    def identity_beside(self, suite: Sequence[SuiteEntry]) -> dict[str, Any]:
        """See Transform: texts of evaluators decide what is kept where they are read by the trimmed model."""
        if self.evaluate == "restored":
            return {}
        for entry in suite:
            if getattr(entry.evaluator, "needs_dense", False):
                raise ConfigError(
                    "evaluate", f"evaluation.{entry.name} compares distributions over all ids, of which the trimmed "
                    "model has none for the removed ones", value=self.evaluate, accepted="restored with this evaluation",
                )  # fmt: skip
        return {"evaluated": sorted(text.key for entry in suite for text in entry.texts.values())}

    def _corpora(self) -> list[Corpus]:
        return [file_corpus(path, "transform.paths", self.text_field) for path in self.paths]

    def outline(self, source: ModelSource, model: Any, blocks: nn.ModuleList) -> None:
        """See Transform: sizes stay those of the whole model, since what occurs is known later."""
        try:
            find_vocabulary(model)
        except ConfigError as error:
            raise ConfigError(
                "", f"{source.name}: {error.problem}", value=error.value, accepted="a model with one embedding and one head",
            ) from error  # fmt: skip

    def apply(self, model: LoadedModel, around: Surroundings) -> LoadedModel:
        """See Transform. What is kept follows from the texts, which are the same whenever the run goes on."""
        embedding, head = find_vocabulary(model.model)
        num_ids, tied = embedding.weight.shape[0], head.weight is embedding.weight
        kept = self._kept(model, around, num_ids)
        # Before the rows are gone from memory they are on disk.
        left, removed = trim(model, kept, around.texts.mask[0].tokens_NT)
        first = model.plan.ranks.first
        if first and not (around.folder / ROWS).is_file():
            write_tensors(around.folder / ROWS, {**removed, "kept": kept})
        saved = sum(rows.numel() * rows.element_size() for rows in removed.values())
        facts = {
            "kept_rows": len(kept),
            "removed_rows": num_ids - len(kept),
            "bytes_saved": saved,
            "tied": tied,
            "evaluated": self.evaluate,
            "note": NOTES[self.evaluate],
        }
        if first:
            write_json(around.folder / RECORD, facts)
        LOG.info(
            "kept %d of %d rows of the vocabulary: %.1f MiB less", len(kept), num_ids, saved / 2**20
        )  # fmt: skip
        return left

    def _kept(self, model: LoadedModel, around: Surroundings, num_ids: int) -> Tensor:
        """Ids whose rows stay, int64, ascending."""
        tokenizer, config = model.tokenizer, model.model.config.get_text_config()
        texts = [*around.texts.all, *(around.evaluated if self.evaluate == "trimmed" else ())]
        ids = {*range(PROBED), *tokenizer.all_special_ids}
        for text in texts:
            ids |= set(text.tokens_NT.flatten().tolist())
        for corpus in self._corpora():
            for document in corpus.documents:
                ids |= set(tokenizer(document)["input_ids"])
        for of in (config, getattr(model.model, "generation_config", None)):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                found = getattr(of, name, None)
                ids |= set(found if isinstance(found, list) else [] if found is None else [found])
        return torch.tensor(sorted(it for it in ids if 0 <= it < num_ids))

    def made_for(self, wanted: Wanted, model: LoadedModel, folder: Path) -> LoadedModel:
        """See Transform: restored for the export, and for the evaluation unless it is to be of the trimmed model."""
        if model.trimmed is None or (wanted == "evaluation" and self.evaluate == "trimmed"):
            return model
        return restore(model, load_file(folder / ROWS))

    def reopened(self, model: LoadedModel, folder: Path) -> LoadedModel:
        """See Transform: trimmed again where the run's evaluation was of the trimmed model."""
        if self.evaluate == "restored":
            return model
        kept = load_file(folder / ROWS)["kept"]
        return trim(model, kept, kept[None])[0]
